"""The interface of every transport: a context's end that sends and a worker's end that receives, one of each per link."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from twotower.errors import Unavailable
from twotower.internal.v1 import link_pb2
from twotower.transport.config import TransportKind
from twotower.transport.layout import check_placed, layout_of, off_loop, unpack
from twotower.wire.frames import FrameAssembler, Key, Spec

Header = Callable[[link_pb2.Placed | None], link_pb2.ContextMessage]
"""Makes the message that announces tensors, from their place; None: they follow in frames."""
Write = Callable[[link_pb2.ContextMessage], Awaitable[None]]
"""Writes to the link's stream."""
ReadFrames = Callable[[], Awaitable[link_pb2.ContextMessage | None]]
"""Reads from the link's stream; None at its end."""


class Outlet(ABC):
    """A context's end. One transfer at a time."""

    kind: TransportKind

    @abstractmethod
    async def send(self, tensors: Sequence[tuple[Key, Tensor]], header: Header, write: Write) -> None:
        """Write the header, and send the tensors behind or beside it.

        The tensors must not change meanwhile. Raises Unavailable when the worker can no longer be reached.
        """

    @abstractmethod
    async def close(self) -> None:
        """End this side of the link. Memory that the worker may still be reading is never written again."""


@dataclass(frozen=True, slots=True)
class Received:
    """One transfer's tensors, valid until they are released."""

    tensors: Mapping[Key, Tensor]
    size: int
    """Bytes of all tensors."""
    release: Callable[[], None]
    """Call it once, in the event loop, when nothing reads the tensors any more."""


class Inlet(ABC):
    """A worker's end. One transfer at a time, in the order of their headers."""

    kind: TransportKind

    @abstractmethod
    async def fetch(self, placed: link_pb2.Placed) -> Tensor:
        """The bytes at `placed`, (length,) uint8. Raises Incompatible, Unavailable."""

    @abstractmethod
    def release(self, placed: link_pb2.Placed) -> None:
        """The bytes have been read, and may be written again."""

    @abstractmethod
    async def close(self) -> None:
        """End this side of the link."""

    async def receive(
        self, placed: link_pb2.Placed | None, expected: Mapping[Key, Spec], device: torch.device, read: ReadFrames
    ) -> Received:
        """The tensors that a header announced, on `device`; on the CPU they are views of the received bytes.

        placed: where they lie; None: in frames, which `read` returns. Raises Incompatible, naming the tensor that does not
        fit, and Unavailable when the other end has gone.
        """
        layout = layout_of(tuple(expected.items()))
        if placed is None:
            frames = FrameAssembler(expected)
            while not frames.complete:
                message = await read()
                if message is None:
                    raise Unavailable("the link ended in the middle of a transfer")
                if not message.HasField("frames"):
                    frames.check()
                frames.add(message.frames)
            size = 0 if device.type == "cpu" else layout.size
            return Received(await off_loop(size, device, lambda: frames.finish(device)), layout.size, _nothing)
        parts = check_placed(placed, expected, layout)
        buffer = await self.fetch(placed)
        if buffer.device.type == device.type:
            return Received(unpack(parts, buffer), layout.size, lambda: self.release(placed))
        copy = await off_loop(layout.size, device, lambda: buffer.to(device))
        self.release(placed)
        return Received(unpack(parts, copy), layout.size, _nothing)


def _nothing() -> None:
    """Nothing is held."""
