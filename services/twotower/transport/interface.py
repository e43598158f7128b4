"""What every transport offers: a context's end that sends, a worker's end that receives."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from twotower.errors import Incompatible
from twotower.transport.config import Kind
from twotower.transport.layout import Part, check_placed, layout_of, off_loop, unpack
from twotower.v1 import context_pb2
from twotower.wire.frames import FrameAssembler, Key, Spec


class Outlet(ABC):
    """A context's end of one attachment."""

    kind: Kind

    @abstractmethod
    def send(self, tensors: Iterable[tuple[Key, Tensor]]) -> AsyncGenerator[context_pb2.ContextMessage]:
        """Send tensors, as far as this is not done beside the stream; yields what is to be written to it, in order.

        The tensors must not change until it is exhausted. An iterator is run in a thread, as its tensors may be
        gathered from pages. Close what is returned (`aclosing`) if it is left before its end.
        Raises Unavailable when the worker cannot be reached any more.
        """

    @abstractmethod
    async def close(self) -> None:
        """The attachment is over. What the worker may still be reading is never written again."""


async def listed(tensors: Iterable[tuple[Key, Tensor]]) -> list[tuple[Key, Tensor]]:
    """A list as it is; an iterator's tensors, which may be made while it runs, from a thread."""
    return tensors if isinstance(tensors, list) else await asyncio.to_thread(list, tensors)


class Inlet(ABC):
    """A worker's end of one attachment."""

    kind: Kind

    @abstractmethod
    async def fetch(self, placed: context_pb2.Placed) -> Tensor:
        """The bytes that `placed` tells of, (length,) uint8. Raises Incompatible, Unavailable."""

    @abstractmethod
    def release(self, placed: context_pb2.Placed) -> None:
        """The bytes have been read, and may be written again."""

    @abstractmethod
    async def close(self) -> None:
        """The attachment is over."""

    def expect(self, expected: Mapping[Key, Spec], device: torch.device) -> Arrival:
        """Get ready for one state, or one delta."""
        return Arrival(self, expected, device)


class Arrival:
    """One state or delta on its way to a worker, by whatever transport, checked against what is expected.

    Use it as a context manager: the tensors are good until it is left.
    """

    def __init__(self, inlet: Inlet, expected: Mapping[Key, Spec], device: torch.device) -> None:
        self._inlet = inlet
        self._expected = expected
        self._device = device
        self._layout = layout_of(tuple(expected.items()))
        self.size = self._layout.size
        """Bytes of all tensors."""
        self._frames = FrameAssembler(expected)
        self._placed: context_pb2.Placed | None = None
        self._parts: Sequence[Part] = []
        self._buffer = torch.empty(0)

    async def add(self, message: context_pb2.ContextMessage) -> bool:
        """Take a message; False if it is about something else. Raises Incompatible, Unavailable."""
        if message.HasField("frames"):
            self._frames.add(message.frames)
            return True
        if not message.HasField("placed"):
            return False
        if self._placed is not None:
            raise Incompatible("placed: sent twice")
        self._parts = check_placed(message.placed, self._expected, self._layout)
        self._buffer = await self._inlet.fetch(message.placed)
        self._placed = message.placed
        return True

    async def tensors(self) -> dict[Key, Tensor]:
        """All of them, on the device; on the CPU they are views. Raises Incompatible if one is missing."""
        if self._placed is None:
            size = 0 if self._device.type == "cpu" else self.size
            return await off_loop(size, self._device, lambda: self._frames.finish(self._device))
        if self._buffer.device.type != self._device.type:
            self._buffer = await off_loop(self.size, self._device, lambda: self._buffer.to(self._device))
        return unpack(self._parts, self._buffer)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        # After an error someone may still be reading; then the context drops the memory when it sees the end.
        if kind is None and self._placed is not None:
            self._inlet.release(self._placed)
