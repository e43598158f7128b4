"""The `shm` transport: the context writes tensors once into memory that the worker reads in place."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from twotower.errors import Incompatible
from twotower.internal.v1 import link_pb2
from twotower.transport.config import TransportKind
from twotower.transport.frames import FrameOutlet
from twotower.transport.inbox import SegmentInbox
from twotower.transport.interface import Header, Inlet, Outlet, Write
from twotower.transport.layout import device_of, lay_out, off_loop, pack
from twotower.transport.segments import PeerSegments
from twotower.wire.frames import Key


class ShmOutlet(Outlet):
    """Leases a segment for every transfer until the worker has read it; where there is no room for one, it sends frames."""

    kind = TransportKind.SHM

    def __init__(self, segments: PeerSegments) -> None:
        self._segments = segments
        self._frames = FrameOutlet()

    async def send(self, tensors: Sequence[tuple[Key, Tensor]], header: Header, write: Write) -> None:
        """See `Outlet`."""
        layout = lay_out(tensors)
        segment = self._segments.lease(layout.length, self)
        if segment is None:
            await self._frames.send(tensors, header, write)
            return
        piece = segment.bytes[: layout.length]
        await off_loop(layout.length, device_of(tensors), lambda: pack(tensors, layout.parts, piece))
        await write(header(layout.placed(segment.number)))

    async def close(self) -> None:
        """See `Outlet`."""
        self._segments.drop(self)


class ShmInlet(Inlet):
    """Reads segments in place."""

    kind = TransportKind.SHM

    def __init__(self, inbox: SegmentInbox) -> None:
        self._inbox = inbox

    async def fetch(self, placed: link_pb2.Placed) -> Tensor:
        """See `Inlet`. No byte is copied."""
        segment = self._inbox.segment(placed.place)
        if placed.length > segment.numel():
            raise Incompatible(f"tensors.length: {placed.length} in a segment of {segment.numel()} bytes")
        return segment[: placed.length]

    def release(self, placed: link_pb2.Placed) -> None:
        """See `Inlet`."""
        self._inbox.release(placed.place)

    async def close(self) -> None:
        """Does nothing: segments belong to the process, not to the link."""
