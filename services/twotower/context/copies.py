"""Memory for the states that are on their way to workers: a few buffers, used again and again.

A fresh copy of a state costs far more than the bytes: the system hands out its pages one by one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from twotower.transport.layout import device_of, lay_out, pack, unpack
from twotower.wire.frames import Key


@dataclass(frozen=True, slots=True)
class Copy:
    """A copied state, as named tensors (see `wire.state`), until its buffer is given back."""

    tensors: Mapping[Key, Tensor]
    buffer: Tensor


class CopyBuffers:
    """At most `most` copies at a time. Not thread-safe: the loop takes and gives back."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._used = 0
        self._free: list[Tensor] = []

    @property
    def available(self) -> bool:
        """Whether another copy may be made."""
        return self._used < self._most

    def copy(self, tensors: Sequence[tuple[Key, Tensor]]) -> Copy:
        """Copy tensors of one device. Raises what an allocation raises."""
        assert self.available
        layout = lay_out(tensors)
        buffer = self._buffer(layout.length, device_of(tensors))
        pack(tensors, layout.parts, buffer)
        self._used += 1
        return Copy(unpack(layout.parts, buffer), buffer)

    def give_back(self, copy: Copy) -> None:
        """Nobody reads the copy any more."""
        self._used -= 1
        self._free.append(copy.buffer)

    def _buffer(self, size: int, device: torch.device) -> Tensor:
        fitting = [buffer for buffer in self._free if buffer.numel() >= size]
        if fitting:
            smallest = min(fitting, key=Tensor.numel)
            self._free = [buffer for buffer in self._free if buffer is not smallest]
            return smallest
        if self._free:  # all too small: one of them makes room
            self._free.pop()
        return torch.empty(1 << (size - 1).bit_length(), dtype=torch.uint8, device=device)
