"""The `grpc` transport: everything in frames on the attach stream. It works everywhere, and stands in for the others."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable

from torch import Tensor

from twotower.errors import Incompatible
from twotower.transport.config import Kind
from twotower.transport.interface import Inlet, Outlet, listed
from twotower.transport.layout import device_of, off_loop
from twotower.v1 import context_pb2
from twotower.wire.frames import Key, to_frames


class FrameOutlet(Outlet):
    """Cuts tensors into messages, one at a time, so that no more than one waits in memory."""

    kind = Kind.GRPC

    async def send(self, tensors: Iterable[tuple[Key, Tensor]]) -> AsyncGenerator[context_pb2.ContextMessage]:
        """See `Outlet`."""
        known = await listed(tensors)
        size = sum(tensor.nbytes for _, tensor in known)
        frames = to_frames(known)
        while (batch := await off_loop(size, device_of(known), lambda: next(frames, None))) is not None:
            yield context_pb2.ContextMessage(frames=batch)

    async def close(self) -> None:
        """Nothing is held."""


class FrameInlet(Inlet):
    """Takes frames only."""

    kind = Kind.GRPC

    async def fetch(self, placed: context_pb2.Placed) -> Tensor:
        """Always raises Incompatible."""
        raise Incompatible("placed: this attachment's transport is grpc, which takes frames only")

    def release(self, placed: context_pb2.Placed) -> None:
        """Nothing is held."""

    async def close(self) -> None:
        """Nothing is held."""
