"""Many tensors in one buffer: where each lies, and the check that they are what the model's config expects."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from twotower.errors import Incompatible
from twotower.v1 import context_pb2, tensor_pb2
from twotower.wire.frames import DTYPE_TO_PB, Key, Spec, check_frame, describe, num_bytes

T = TypeVar("T")

ALIGNMENT = 64
"""Bytes; every tensor begins at a multiple."""

INLINE_BYTES = 256 * 1024
"""Copying less than this takes no longer than handing it to a thread."""


class Part(NamedTuple):
    """A tensor's place in a buffer."""

    key: Key
    spec: Spec
    offset: int


async def off_loop(size: int, work: Callable[[], T]) -> T:
    """Do `work`, which copies `size` bytes, where it does not hold up the event loop.

    It is over when this returns, cancelled or not: what it reads and writes may then be given to others.
    """
    if size < INLINE_BYTES:
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


def lay_out(tensors: Sequence[tuple[Key, Tensor]]) -> tuple[list[Part], int]:
    """A place for each tensor, in order, and the bytes of all."""
    parts, offset = [], 0
    for key, tensor in tensors:
        parts.append(Part(key, Spec(tensor.dtype, tuple(tensor.shape)), offset))
        offset += _padded(tensor.nbytes)
    return parts, offset


def pack(tensors: Sequence[tuple[Key, Tensor]], parts: Sequence[Part], buffer: Tensor) -> None:
    """Copy tensors to their places in `buffer` (bytes,) uint8, each once; from another device, all at once."""
    source = tensors[0][1].device if tensors else buffer.device
    there = buffer if source == buffer.device else torch.empty_like(buffer, device=source)
    for (_, tensor), part in zip(tensors, parts, strict=True):
        _view(there, part).copy_(tensor)
    if there is not buffer:
        buffer.copy_(there)


def unpack(parts: Sequence[Part], buffer: Tensor) -> dict[Key, Tensor]:
    """The tensors, as views of `buffer` (bytes,) uint8."""
    return {part.key: _view(buffer, part) for part in parts}


def placed_message(place: int, length: int, parts: Sequence[Part]) -> context_pb2.ContextMessage:
    """Tells the worker where the tensors lie."""
    frames = [
        tensor_pb2.Frame(
            name=part.key.name,
            layer=part.key.layer,
            dtype=DTYPE_TO_PB[part.spec.dtype],
            shape=part.spec.shape,
            offset=part.offset,
        )
        for part in parts
    ]
    return context_pb2.ContextMessage(placed=context_pb2.Placed(place=place, length=length, tensors=frames))


def check_placed(placed: context_pb2.Placed, expected: Mapping[Key, Spec]) -> list[Part]:
    """The places of exactly the expected tensors. Raises Incompatible, naming what does not fit."""
    most = sum(_padded(num_bytes(spec)) for spec in expected.values())
    if not 0 <= placed.length <= most:
        raise Incompatible(f"placed.length: {placed.length}, expected at most {most}")
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
