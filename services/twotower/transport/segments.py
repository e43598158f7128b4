"""The context's side of shared memory without names: it makes segments, hands them to workers, and reuses them.

A segment is a memfd. It reaches the worker's process over an abstract unix socket, so there is nothing in /dev/shm, nothing
to unlink, and no limit of a container's /dev/shm: when the last of the two processes ends, in whatever way, the kernel
frees the memory. On the connection, the context sends a segment's number with its file descriptor (take this) or
without (forget this), and the worker sends numbers back (I have read this). The end of the connection means that
either process has ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import os
import secrets
import socket
import struct

import torch
from torch import Tensor

from twotower.errors import Unavailable

NUMBER = struct.Struct("!Q")
"""A segment's number, as a message."""

SMALLEST = 1 << 20


def map_segment(fd: int, size: int) -> Tensor:
    """The memory of `fd`, (size,) uint8. It stays mapped as long as a view of it exists."""
    return torch.frombuffer(mmap.mmap(fd, size), dtype=torch.uint8)


def peer_uid(connection: socket.socket) -> int:
    """The user of the process at the other end of a unix socket."""
    size = struct.calcsize("iII")
    _, uid, _ = struct.unpack("iII", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
    return int(uid)


class Segment:
    """A piece of shared memory; the system allocates its pages when they are first written."""

    def __init__(self, size: int) -> None:
        self.number = secrets.randbits(64)
        self.size = size
        self.fd = os.memfd_create("twotower", os.MFD_CLOEXEC)
        try:
            os.ftruncate(self.fd, size)
            self.bytes = map_segment(self.fd, size)
        except BaseException:
            os.close(self.fd)
            raise


class SegmentPool:
    """All segments of a context, for all its workers, at most `limit` bytes. Use it in the event loop only."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._peers: dict[str, PeerSegments] = {}

    @property
    def used(self) -> int:
        """The bytes of all segments."""
        return sum(peer.used for peer in self._peers.values())

    def connect(self, address: str) -> PeerSegments | None:
        """The segments of the worker that listens at abstract unix socket `address`; None if it cannot be reached from here."""
        known = self._peers.get(address)
        if known is not None and not known.closed:
            return known
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            connection.setblocking(False)
            connection.connect("\0" + address)
            if peer_uid(connection) != os.geteuid():
                raise PermissionError("another user's process")
        except OSError:
            connection.close()
            return None
        peer = self._peers[address] = PeerSegments(self, address, connection)
        return peer

    def make_room(self, size: int) -> bool:
        """Drop segments that no worker reads until `size` bytes fit; returns False if they cannot."""
        for peer in list(self._peers.values()):
            while self.used + size > self._limit and peer.drop_free():
                pass
        return self.used + size <= self._limit

    def forget(self, address: str) -> None:
        """Forget the segments of a worker that has gone."""
        self._peers.pop(address, None)

    def close(self) -> None:
        """Release all segments."""
        for peer in list(self._peers.values()):
            peer.close()


class PeerSegments:
    """The segments that are shared with one worker process."""

    def __init__(self, pool: SegmentPool, address: str, connection: socket.socket) -> None:
        self._pool = pool
        self._address = address
        self._connection = connection
        self._leased: dict[int, tuple[Segment, object]] = {}
        self._free: dict[int, Segment] = {}
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(connection, self._read)
        self.closed = False

    @property
    def used(self) -> int:
        """The bytes of all its segments."""
        leased = sum(segment.size for segment, _ in self._leased.values())
        return leased + sum(segment.size for segment in self._free.values())

    def lease(self, size: int, owner: object) -> Segment | None:
        """A segment of at least `size` bytes that the worker does not read, leased until the worker has read it.

        Returns None if that would take too much memory. Raises Unavailable when the worker has gone.
        """
        self._read()  # what the worker has given back by now
        if self.closed:
            raise Unavailable("the worker has closed its shared memory")
        size = max(SMALLEST, 1 << (size - 1).bit_length())
        segment = next((free for free in self._free.values() if free.size == size), None)
        if segment is not None:
            del self._free[segment.number]
        else:
            if not self._pool.make_room(size):
                return None
            segment = Segment(size)
            try:
                self._send(segment.number, segment.fd)
            finally:
                os.close(segment.fd)  # the worker has its own descriptor, and we keep the mapping
        self._leased[segment.number] = segment, owner
        return segment

    def drop(self, owner: object) -> None:
        """Forget the segments that `owner` leased and the worker has not returned: it may still read them, so they are
        never written again."""
        self._read()
        for number in [number for number, (_, who) in self._leased.items() if who is owner]:
            self._leased.pop(number, None)
            with contextlib.suppress(Unavailable):
                self._send(number)

    def drop_free(self) -> bool:
        """Forget one segment that the worker does not read; returns False if there is none."""
        self._read()  # what the worker has given back by now
        if not self._free:
            return False
        number, _ = self._free.popitem()
        with contextlib.suppress(Unavailable):
            self._send(number)
        return True

    def close(self) -> None:
        """Forget all segments, and let the worker know. Memory that is still being written stays mapped until that is over."""
        if not self.closed:
            self.closed = True
            self._loop.remove_reader(self._connection)
            self._connection.close()
            self._leased.clear()
            self._free.clear()
            self._pool.forget(self._address)

    def _send(self, number: int, *fds: int) -> None:
        if self.closed:
            return
        try:
            socket.send_fds(self._connection, [NUMBER.pack(number)], fds)
        except OSError as error:  # the worker has gone, or has hundreds of unread messages
            self.close()
            raise Unavailable(f"the worker cannot be reached by shared memory: {error}") from None

    def _read(self) -> None:
        """Read all waiting messages: numbers of segments that the worker has read."""
        while not self.closed:
            try:
                message = self._connection.recv(NUMBER.size)
            except BlockingIOError:
                return
            except OSError:
                message = b""
            if not message:
                self.close()
                return
            number = NUMBER.unpack(message)[0]
            if number in self._leased:
                self._free[number], _ = self._leased.pop(number)
