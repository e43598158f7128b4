"""The other process is killed in the middle of a transfer: no end waits for ever, and no memory stays."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import torch

from tests.support.transports import (
    CONTEXT_ADDRESS,
    CPU,
    WORKER_PEER,
    Stream,
    ends,
    header,
    mapped_segments,
    messages,
    placed_in,
    receive,
    same_bits,
    send,
)
from tests.support.waiting import until
from twotower.errors import Unavailable
from twotower.internal.v1 import link_pb2
from twotower.transport.config import TransportConfig, TransportKind
from twotower.transport.ends import ContextTransports, WorkerTransports
from twotower.wire.frames import Key, Spec

BIG = [(Key("ssm", 0), torch.ones(20_000_000))]
SMALL = {Key("ssm", 0): Spec(torch.float32, (1000,))}
"""What the context's process announces."""


class Peer:
    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    async def line(self) -> bytes:
        assert self.process.stdout is not None
        return bytes.fromhex((await self.process.stdout.readline()).decode())

    def send(self, message: bytes) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(message.hex().encode() + b"\n")

    async def die(self) -> None:
        self.process.kill()
        await self.process.wait()


@asynccontextmanager
async def _peer(role: str, kind: TransportKind) -> AsyncIterator[Peer]:
    pipe = asyncio.subprocess.PIPE
    argv = (sys.executable, "-m", "tests.support.transport_peer", role, kind.value)
    process = await asyncio.create_subprocess_exec(*argv, stdin=pipe, stdout=pipe)
    try:
        yield Peer(process)
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


@pytest.mark.parametrize("kind", [TransportKind.SHM, TransportKind.DIST])
async def test_a_worker_dies(kind: TransportKind) -> None:
    before = sorted(os.listdir("/dev/shm"))
    context = ContextTransports(TransportConfig(kind, timeout_s=60), "127.0.0.1", CPU)
    async with _peer("worker", kind) as peer, asyncio.timeout(50):
        outlet, choice = context.attach(link_pb2.TransportOffer.FromString(await peer.line()), WORKER_PEER)
        peer.send(choice.SerializeToString())
        assert await peer.line() == b"attached"
        stream = Stream()
        sending = asyncio.create_task(send(outlet, BIG, stream))
        announced = await stream.read()
        assert announced is not None
        assert placed_in(announced) is not None
        await asyncio.sleep(0.1)
        assert sending.done() == (kind is TransportKind.SHM)  # with dist, the context is in the middle of sending
        await peer.die()
        if kind is TransportKind.SHM:
            sending = asyncio.create_task(send(outlet, BIG, stream))
        with pytest.raises(Unavailable):
            await sending
        await outlet.close()
        await until(lambda: mapped_segments() == 0)
        assert context._pairs.open == 0
    context.close()
    assert sorted(os.listdir("/dev/shm")) == before


@pytest.mark.parametrize("kind", [TransportKind.SHM, TransportKind.DIST])
async def test_a_context_dies(kind: TransportKind) -> None:
    before = sorted(os.listdir("/dev/shm"))
    worker = WorkerTransports(TransportConfig(kind, timeout_s=60), CPU)
    async with _peer("context", kind) as peer, asyncio.timeout(50):
        peer.send(worker.offer.SerializeToString())
        inlet = worker.attach(link_pb2.TransportChoice.FromString(await peer.line()), CONTEXT_ADDRESS)
        stream = Stream()
        await stream.write(link_pb2.ContextMessage.FromString(await peer.line()))
        receiving = asyncio.create_task(receive(inlet, stream, SMALL))
        await asyncio.sleep(0.1)
        assert receiving.done() == (kind is TransportKind.SHM)
        await peer.die()
        if kind is TransportKind.DIST:
            with pytest.raises(Unavailable):
                await receiving
        else:  # what was written can still be read, and is gone after that
            received = await receiving
            assert same_bits(received.tensors[Key("ssm", 0)], torch.arange(1000, dtype=torch.float32))
            assert mapped_segments() == 1
            await inlet.close()
            received.release()  # late, and to nobody
            del received, receiving
            await until(lambda: mapped_segments() == 0)
        await inlet.close()
    worker.close()
    assert sorted(os.listdir("/dev/shm")) == before


async def test_a_context_dies_between_two_frames() -> None:
    async with ends(TransportConfig(TransportKind.GRPC)) as both, asyncio.timeout(20):
        outlet, inlet = both.attach()
        announced, *frames = await messages(outlet, BIG)
        assert announced == header(None)
        stream = Stream()
        for message in (announced, *frames[:-1]):
            await stream.write(message)
        stream.end()
        with pytest.raises(Unavailable, match="in the middle of a transfer"):
            await receive(inlet, stream, {key: Spec(tensor.dtype, tuple(tensor.shape)) for key, tensor in BIG})


async def test_a_stream_that_breaks_in_the_middle_of_a_transfer() -> None:
    """The outlet raises what the stream raises, and nothing that was begun stays when the link is closed."""

    class Broken(Exception):
        pass

    async def write(message: link_pb2.ContextMessage) -> None:
        raise Broken

    for kind in TransportKind:
        async with ends(TransportConfig(kind, timeout_s=10)) as both, asyncio.timeout(20):
            outlet, inlet = both.attach()
            with pytest.raises(Broken):
                await outlet.send(BIG, header, write)
            await outlet.close()
            await inlet.close()
            assert both.context._segments.used == 0
            assert both.context._pairs.open == 0
            assert not both.context._pairs.failed(both.worker.offer.peer, "gloo")  # the group did not break
            await until(lambda: mapped_segments() == 0)
