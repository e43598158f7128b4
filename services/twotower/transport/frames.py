"""The `grpc` transport: all tensors go in frames on the link's stream. It works everywhere, and is the others' fallback."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from twotower.errors import Incompatible
from twotower.internal.v1 import link_pb2
from twotower.transport.config import TransportKind
from twotower.transport.interface import Header, Inlet, Outlet, Write
from twotower.transport.layout import device_of, off_loop
from twotower.wire.frames import Key, to_frames


class FrameOutlet(Outlet):
    """Cuts tensors into messages, one at a time, so that no more than one waits in memory."""

    kind = TransportKind.GRPC

    async def send(self, tensors: Sequence[tuple[Key, Tensor]], header: Header, write: Write) -> None:
        """See `Outlet`."""
        await write(header(None))
        size = sum(tensor.nbytes for _, tensor in tensors)
        frames = to_frames(tensors)
        while (batch := await off_loop(size, device_of(tensors), lambda: next(frames, None))) is not None:
            await write(link_pb2.ContextMessage(frames=batch))

    async def close(self) -> None:
        """Nothing is held."""


class FrameInlet(Inlet):
    """Accepts frames only."""

    kind = TransportKind.GRPC

    async def fetch(self, placed: link_pb2.Placed) -> Tensor:
        """Always raises Incompatible."""
        raise Incompatible("tensors: this link's transport is grpc, which takes frames only")

    def release(self, placed: link_pb2.Placed) -> None:
        """Nothing is held."""

    async def close(self) -> None:
        """Nothing is held."""
