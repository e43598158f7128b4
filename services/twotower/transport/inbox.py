"""The worker's side of shared memory without names: it receives segments from contexts (see `segments`)."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import socket
from collections import deque

from torch import Tensor

from twotower.errors import Incompatible
from twotower.transport.segments import NUMBER, map_segment, peer_uid

log = logging.getLogger(__name__)

BACKLOG = 128
ACCEPT_RETRY_S = 0.5


class SegmentInbox:
    """A listening socket, and the segments received on it. Make it in a running event loop, and use it there only."""

    def __init__(self) -> None:
        self.address = f"twotower-{secrets.token_hex(16)}"
        """The address of the abstract unix socket."""
        self._loop = asyncio.get_running_loop()
        self._segments: dict[int, tuple[socket.socket, Tensor]] = {}
        self._connections: set[socket.socket] = set()
        self._unsent: dict[socket.socket, deque[int]] = {}
        """Segment numbers that could not be sent back yet, because the context has not read hundreds of earlier ones."""
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.setblocking(False)
        self._listener.bind("\0" + self.address)
        self._listener.listen(BACKLOG)
        self._listen()

    def segment(self, number: int) -> Tensor:
        """A segment's memory, (size,) uint8. Raises Incompatible."""
        if number not in self._segments:  # sent before the message that names it, but perhaps not read yet
            self._accept()
            for connection in list(self._connections):
                self._read(connection)
        if number not in self._segments:
            raise Incompatible(f"tensors.place: no segment {number} has come from a context")
        return self._segments[number][1]

    def release(self, number: int) -> None:
        """Report to the context that the segment has been read."""
        connection, _ = self._segments.get(number, (None, None))
        if connection is None:
            return
        unsent = self._unsent.setdefault(connection, deque())
        unsent.append(number)
        if len(unsent) == 1:
            self._send_waiting(connection)

    def _send_waiting(self, connection: socket.socket) -> None:
        """Send numbers as far as the connection takes them now, and the rest later."""
        unsent = self._unsent[connection]
        while unsent:
            try:
                connection.send(NUMBER.pack(unsent[0]))
            except BlockingIOError:
                self._loop.add_writer(connection, self._send_waiting, connection)
                return
            except OSError:  # the context has gone, which `_read` sees at the connection's end
                break
            unsent.popleft()
        del self._unsent[connection]
        self._loop.remove_writer(connection)

    def close(self) -> None:
        """Release everything. Memory that is still being read stays mapped until that is over."""
        for connection in list(self._connections):
            self._leave(connection)
        if self._listener.fileno() >= 0:  # closing twice is no error
            self._loop.remove_reader(self._listener)
            self._listener.close()

    def _listen(self) -> None:
        if self._listener.fileno() >= 0:
            self._loop.add_reader(self._listener, self._accept)

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except BlockingIOError:  # no more
                return
            except OSError as error:  # no file descriptors are left now, but some may be freed later
                log.warning("a context's shared memory cannot be taken now: %s", error)
                self._loop.remove_reader(self._listener)
                self._loop.call_later(ACCEPT_RETRY_S, self._listen)
                return
            if peer_uid(connection) != os.geteuid():
                connection.close()
                continue
            connection.setblocking(False)
            self._connections.add(connection)
            self._loop.add_reader(connection, self._read, connection)

    def _read(self, connection: socket.socket) -> None:
        """Read all waiting messages: a number with a descriptor is a new segment, a number alone is one to forget."""
        while connection in self._connections:
            try:
                message, fds, _, _ = socket.recv_fds(connection, NUMBER.size, 1)
            except BlockingIOError:
                return
            except OSError:
                message, fds = b"", []
            if not message:
                self._leave(connection)
                return
            (number,) = NUMBER.unpack(message)
            if not fds:
                self._segments.pop(number, None)
                continue
            try:
                self._segments[number] = connection, map_segment(fds[0], os.fstat(fds[0]).st_size)
            finally:
                os.close(fds[0])

    def _leave(self, connection: socket.socket) -> None:
        self._loop.remove_reader(connection)
        self._loop.remove_writer(connection)
        self._unsent.pop(connection, None)
        self._connections.discard(connection)
        connection.close()
        for number in [number for number, (owner, _) in self._segments.items() if owner is connection]:
            del self._segments[number]
