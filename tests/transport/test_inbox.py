"""A worker's end of shared memory: no segment is lost, whatever the other end does or the system lacks."""

from __future__ import annotations

import asyncio
import os
import socket
from typing import Any

import pytest

from tests.support.waiting import until
from twotower.transport import inbox as inbox_module
from twotower.transport.inbox import SegmentInbox
from twotower.transport.segments import NUMBER


async def _connected(inbox: SegmentInbox) -> socket.socket:
    context = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    context.connect("\0" + inbox.address)
    return context


def _send(context: socket.socket, number: int) -> None:
    fd = os.memfd_create("test")
    os.ftruncate(fd, 4096)
    socket.send_fds(context, [NUMBER.pack(number)], [fd])
    os.close(fd)


async def test_every_segment_is_given_back_to_a_context_that_is_slow_to_read() -> None:
    inbox, count = SegmentInbox(), 2000
    context = await _connected(inbox)
    try:
        _send(context, 7)
        assert inbox.segment(7).numel() == 4096
        for _ in range(count):
            inbox.release(7)  # more than the connection holds
        assert inbox._unsent
        context.setblocking(False)
        for _ in range(count):
            assert NUMBER.unpack(await asyncio.wait_for(asyncio.get_running_loop().sock_recv(context, NUMBER.size), 5)) == (7,)
        await until(lambda: not inbox._unsent)
        inbox.release(7)
        assert await asyncio.get_running_loop().sock_recv(context, NUMBER.size) == NUMBER.pack(7)
    finally:
        context.close()
        inbox.close()


async def test_a_context_that_goes_takes_its_segments_with_it() -> None:
    inbox = SegmentInbox()
    context = await _connected(inbox)
    _send(context, 7)
    inbox.segment(7)
    for _ in range(2000):
        inbox.release(7)
    context.close()
    await until(lambda: not inbox._connections)
    assert not inbox._unsent
    assert not inbox._segments
    inbox.release(7)  # nobody's
    inbox.close()


async def test_without_file_descriptors_it_waits_for_some(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inbox_module, "ACCEPT_RETRY_S", 0.05)
    inbox = SegmentInbox()
    accept, tries = inbox._listener.accept, 0

    class Listener:
        def accept(self) -> Any:
            nonlocal tries
            tries += 1
            if tries < 3:
                raise OSError(24, "Too many open files")
            return accept()

        def __getattr__(self, name: str) -> Any:
            return getattr(listener, name)

    listener = inbox._listener
    inbox._listener = Listener()  # type: ignore[assignment]
    context = await _connected(inbox)
    try:
        await until(lambda: bool(inbox._connections))
        assert 3 <= tries < 10  # rather than as often as the event loop turns
        _send(context, 7)
        await until(lambda: 7 in inbox._segments)
    finally:
        context.close()
        inbox.close()
