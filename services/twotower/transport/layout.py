"""Many tensors in one buffer: where each lies, and the check that they match the model's config."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from twotower.errors import Incompatible
from twotower.internal.v1 import link_pb2, tensor_pb2
from twotower.wire.frames import DTYPE_TO_PB, Key, Spec, check_frame, describe, num_bytes

T = TypeVar("T")

ALIGNMENT = 64
"""Bytes; every tensor begins at a multiple of this."""

INLINE_BYTES = 1024 * 1024
"""Copying fewer bytes than this within a CPU's memory takes no longer than handing the copy to a thread."""


class Part(NamedTuple):
    """A tensor's place in a buffer."""

    key: Key
    spec: Spec
    offset: int


class Layout:
    """The places of a set of tensors, and the message that describes them: made once, and used for every block."""

    def __init__(self, specs: Sequence[tuple[Key, Spec]]) -> None:
        parts, offset = [], 0
        for key, spec in specs:
            parts.append(Part(key, spec, offset))
            offset += _padded(num_bytes(spec))
        self.parts: Sequence[Part] = parts
        """In the order of the tensors."""
        self.length = offset
        """The buffer's bytes."""
        self.size = sum(num_bytes(spec) for _, spec in specs)
        """The tensors' bytes, without padding."""
        self._placed = link_pb2.Placed(
            length=offset,
            tensors=[
                tensor_pb2.Frame(name=key.name, layer=key.layer, dtype=DTYPE_TO_PB[spec.dtype], shape=spec.shape, offset=offset)
                for key, spec, offset in parts
            ],
        )

    def placed(self, place: int) -> link_pb2.Placed:
        """The message that announces the tensors at `place` to the worker."""
        placed = link_pb2.Placed()
        placed.CopyFrom(self._placed)
        placed.place = place
        return placed

    def describes(self, placed: link_pb2.Placed) -> bool:
        """Whether `placed` describes exactly this layout."""
        return bool(placed.length == self.length and placed.tensors == self._placed.tensors)


layout_of = lru_cache(maxsize=64)(Layout)
"""Makes a `Layout` from a tuple, and keeps the few that are in use."""


async def off_loop(size: int, device: torch.device, work: Callable[[], T]) -> T:
    """Run `work`, which copies `size` bytes from or to `device`, where it does not hold up the event loop.

    The copy has ended when this returns, cancelled or not: its memory may then be reused.
    """
    if size < (INLINE_BYTES if device.type == "cpu" else 1):  # a copy from or to another device waits for its computations
        return work()
    task = asyncio.ensure_future(asyncio.to_thread(work))
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait((task,))
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled
    return task.result()


def device_of(tensors: Sequence[tuple[Key, Tensor]]) -> torch.device:
    """The device that holds all of the tensors."""
    return tensors[0][1].device if tensors else torch.device("cpu")


def lay_out(tensors: Sequence[tuple[Key, Tensor]]) -> Layout:
    """The layout of these tensors, in order."""
    return layout_of(tuple((key, Spec(tensor.dtype, tuple(tensor.shape))) for key, tensor in tensors))


def pack(tensors: Sequence[tuple[Key, Tensor]], parts: Sequence[Part], buffer: Tensor) -> None:
    """Copy tensors to their places in `buffer` (bytes,) uint8; from another device, all in one copy."""
    source = device_of(tensors) if tensors else buffer.device
    there = buffer if source == buffer.device else torch.empty_like(buffer, device=source)
    for (_, tensor), part in zip(tensors, parts, strict=True):
        _view(there, part).copy_(tensor)
    if there is not buffer:
        buffer.copy_(there)


def unpack(parts: Sequence[Part], buffer: Tensor) -> dict[Key, Tensor]:
    """The tensors, as views of `buffer` (bytes,) uint8."""
    return {part.key: _view(buffer, part) for part in parts}


def check_placed(placed: link_pb2.Placed, expected: Mapping[Key, Spec], usual: Layout) -> Sequence[Part]:
    """The places of exactly the expected tensors, normally the `usual` layout's. Raises Incompatible, naming the difference."""
    if usual.describes(placed):
        return usual.parts
    most = sum(_padded(num_bytes(spec)) for spec in expected.values())
    if not 0 <= placed.length <= most:
        raise Incompatible(f"tensors.length: {placed.length}, expected at most {most}")
    parts: dict[Key, Part] = {}
    for frame in placed.tensors:
        key = Key(frame.name, frame.layer)
        spec = check_frame(frame, expected)
        end = frame.offset + num_bytes(spec)
        if key in parts:
            raise Incompatible(f"{describe(key)}: given twice")
        if frame.offset < 0 or frame.offset % ALIGNMENT or end > placed.length:
            raise Incompatible(f"{describe(key)}: offset {frame.offset} does not fit into {placed.length} bytes")
        parts[key] = Part(key, spec, frame.offset)
    for key in expected:
        if key not in parts:
            raise Incompatible(f"{describe(key)}: missing")
    return list(parts.values())


def _view(buffer: Tensor, part: Part) -> Tensor:
    flat = buffer[part.offset : part.offset + num_bytes(part.spec)]
    return flat.view(part.spec.dtype).view(part.spec.shape)


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
