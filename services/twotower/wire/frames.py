"""Tensors as frames: cut into pieces that fit gRPC messages, reassembled, and checked against their specs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from twotower.errors import Incompatible
from twotower.internal.v1 import tensor_pb2

MESSAGE_BYTES = 2 * 1024 * 1024
"""Payload of one message. gRPC was the fastest at this size."""

DTYPE_TO_PB = {torch.float32: tensor_pb2.DTYPE_FLOAT32, torch.bfloat16: tensor_pb2.DTYPE_BFLOAT16}


class Key(NamedTuple):
    """Identifies a tensor by its name in the layer, and the layer."""

    name: str
    layer: int


class Spec(NamedTuple):
    """The dtype and shape that a tensor must have."""

    dtype: torch.dtype
    shape: tuple[int, ...]


def to_frames(tensors: Iterable[tuple[Key, Tensor]]) -> Iterator[tensor_pb2.FrameBatch]:
    """Cut tensors into messages of about `MESSAGE_BYTES`: many small tensors share one, a large one spans several."""
    batch, room = tensor_pb2.FrameBatch(), MESSAGE_BYTES
    for key, tensor in tensors:
        flat = tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy()
        offset = 0
        while offset < flat.size or offset == 0:
            if room <= 0:
                yield batch
                batch, room = tensor_pb2.FrameBatch(), MESSAGE_BYTES
            piece = flat[offset : offset + room].tobytes()
            batch.frames.add(
                name=key.name, layer=key.layer, dtype=DTYPE_TO_PB[tensor.dtype], shape=tensor.shape, offset=offset, data=piece
            )
            room -= max(len(piece), 1)
            offset += max(len(piece), 1)
    if batch.frames:
        yield batch


class FrameAssembler:
    """Collects the frames of an expected set of tensors; refuses a frame that does not fit, naming its tensor."""

    def __init__(self, expected: Mapping[Key, Spec]) -> None:
        self._expected = expected
        self._buffers: dict[Key, bytearray] = {}
        self._missing = sum(max(num_bytes(spec), 1) for spec in expected.values())

    @property
    def complete(self) -> bool:
        """Whether all tensors have arrived, to the last byte."""
        return self._missing == 0

    def add(self, batch: tensor_pb2.FrameBatch) -> None:
        """Add a message's frames. Raises Incompatible."""
        for frame in batch.frames:
            key = Key(frame.name, frame.layer)
            spec = check_frame(frame, self._expected)
            where = describe(key)
            here = len(self._buffers.get(key, b""))
            if frame.offset != here:
                raise Incompatible(f"{where}: offset {frame.offset}, expected {here}")
            if not frame.data and (key in self._buffers or num_bytes(spec)):
                raise Incompatible(f"{where}: a piece without data")
            buffer = self._buffers.setdefault(key, bytearray())
            buffer += frame.data
            self._missing -= max(len(frame.data), 1)
            if len(buffer) > num_bytes(spec):
                raise Incompatible(f"{where}: data of more than {num_bytes(spec)} bytes")

    def check(self) -> None:
        """Raise Incompatible, naming the tensor, if one is missing or incomplete."""
        for key, spec in self._expected.items():
            buffer = self._buffers.get(key)
            if buffer is None:
                raise Incompatible(f"{describe(key)}: missing")
            if len(buffer) != num_bytes(spec):
                raise Incompatible(f"{describe(key)}: data of {len(buffer)} bytes, expected {num_bytes(spec)}")

    def finish(self, device: torch.device) -> dict[Key, Tensor]:
        """All tensors. Raises Incompatible as `check` does."""
        self.check()
        out = {}
        for key, spec in self._expected.items():
            buffer = self._buffers[key]
            tensor = torch.frombuffer(buffer, dtype=spec.dtype) if buffer else torch.empty(0, dtype=spec.dtype)
            out[key] = tensor.view(spec.shape).to(device)
        return out


def check_frame(frame: tensor_pb2.Frame, expected: Mapping[Key, Spec]) -> Spec:
    """The spec of the frame's tensor, if the frame's header matches it. Raises Incompatible, naming the difference."""
    key = Key(frame.name, frame.layer)
    spec = expected.get(key)
    if spec is None:
        raise Incompatible(f"{describe(key)}: not expected here")
    if frame.dtype != DTYPE_TO_PB[spec.dtype]:
        raise Incompatible(f"{describe(key)}: dtype {frame.dtype}, expected {DTYPE_TO_PB[spec.dtype]}")
    if tuple(frame.shape) != spec.shape:
        raise Incompatible(f"{describe(key)}: shape {list(frame.shape)}, expected {list(spec.shape)}")
    return spec


def describe(key: Key) -> str:
    """The tensor's name in error messages."""
    return f"frame {key.name!r} of layer {key.layer}"


def num_bytes(spec: Spec) -> int:
    """The bytes of the tensor's elements."""
    return math.prod(spec.shape) * spec.dtype.itemsize
