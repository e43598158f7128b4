"""The `shm` transport: tensors are written once into memory that the worker reads in place."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable

from torch import Tensor

from twotower.errors import Incompatible
from twotower.transport.config import Kind
from twotower.transport.frames import FrameOutlet
from twotower.transport.inbox import SegmentInbox
from twotower.transport.interface import Inlet, Outlet, listed
from twotower.transport.layout import device_of, lay_out, off_loop, pack
from twotower.transport.segments import PeerSegments
from twotower.v1 import context_pb2
from twotower.wire.frames import Key


class ShmOutlet(Outlet):
    """Leases a segment for every transfer, until the worker has read it; without room for one, it sends frames."""

    kind = Kind.SHM

    def __init__(self, segments: PeerSegments) -> None:
        self._segments = segments
        self._frames = FrameOutlet()

    async def send(self, tensors: Iterable[tuple[Key, Tensor]]) -> AsyncGenerator[context_pb2.ContextMessage]:
        """See `Outlet`."""
        known = await listed(tensors)
        layout = lay_out(known)
        segment = self._segments.lease(layout.length, self)
        if segment is None:
            async for message in self._frames.send(known):
                yield message
            return
        await off_loop(layout.length, device_of(known), lambda: pack(known, layout.parts, segment.bytes[: layout.length]))
        yield layout.message(segment.number)

    async def close(self) -> None:
        """See `Outlet`."""
        self._segments.drop(self)


class ShmInlet(Inlet):
    """Reads segments where they are."""

    kind = Kind.SHM

    def __init__(self, inbox: SegmentInbox) -> None:
        self._inbox = inbox

    async def fetch(self, placed: context_pb2.Placed) -> Tensor:
        """See `Inlet`. No byte is moved."""
        segment = self._inbox.segment(placed.place)
        if placed.length > segment.numel():
            raise Incompatible(f"placed.length: {placed.length} in a segment of {segment.numel()} bytes")
        return segment[: placed.length]

    def release(self, placed: context_pb2.Placed) -> None:
        """See `Inlet`."""
        self._inbox.give_back(placed.place)

    async def close(self) -> None:
        """Segments belong to the process, not to the attachment."""
