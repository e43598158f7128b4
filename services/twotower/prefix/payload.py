"""A state at a chunk border as bytes: the part that only that border has, and the keys and values of each chunk before it.

The keys and values of a chunk are the same for all prefixes that share it, so they are stored once. All are frames
(see `wire.frames`), in pieces of about 2 MiB, and are checked against the model's config.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from google.protobuf.message import DecodeError
from torch import Tensor

from twotower.errors import Incompatible
from twotower.internal.v1 import tensor_pb2
from twotower.model.config import ModelConfig
from twotower.wire.frames import FrameAssembler, Key, Spec, to_frames
from twotower.wire.state import state_spec

PAYLOAD_VERSION = 1
"""The version of the frames' names and layout. It is part of every key, so that versions never mix."""

CPU = torch.device("cpu")


class PrefixPayload:
    """Cuts states of one model into payloads, and reassembles them. No Redis here."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, chunk_tokens: int) -> None:
        self._config = config
        self._dtype = dtype
        self._chunk = chunk_tokens
        self._border = {key: spec for key, spec in state_spec(config, dtype, 0).items() if key.name in ("conv", "ssm")}
        self._of_chunk = _kv(state_spec(config, dtype, chunk_tokens))

    def size(self, chunks: int) -> int:
        """Bytes of the tensors of a whole state of `chunks` chunks."""
        specs = (*self._border.values(), *_kv(state_spec(self._config, self._dtype, chunks * self._chunk)).values())
        return sum(torch.Size(spec.shape).numel() * spec.dtype.itemsize for spec in specs)

    def check(self, tensors: Mapping[Key, Tensor], chunks: int) -> None:
        """Raise Incompatible, naming the tensor, unless these are a state after `chunks` chunks."""
        for key, spec in (self._border | _kv(state_spec(self._config, self._dtype, chunks * self._chunk))).items():
            found = tensors.get(key)
            if found is None or Spec(found.dtype, tuple(found.shape)) != spec:
                problem = "missing" if found is None else f"{found.dtype} {list(found.shape)}"
                raise Incompatible(f"{key.name!r} of layer {key.layer}: {problem}, expected {spec.dtype} {list(spec.shape)}")

    def pack_border(self, tensors: Mapping[Key, Tensor]) -> list[bytes]:
        """Conv tails (conv_dim, K - 1) and S (heads, head_dim, state) of a state that was checked."""
        return _pack((key, tensors[key]) for key in self._border)

    def pack_chunk(self, tensors: Mapping[Key, Tensor], index: int) -> list[bytes]:
        """K and V (kv_heads, chunk_tokens, head_dim) of one chunk of a state that was checked."""
        start = index * self._chunk
        return _pack((key, tensors[key][:, start : start + self._chunk]) for key in self._of_chunk)

    def unpack(self, border: Sequence[bytes], chunks: Sequence[Sequence[bytes]]) -> dict[Key, Tensor]:
        """The whole state on the CPU: conv, ssm, and k, v (kv_heads, tokens, head_dim). Raises Incompatible."""
        state = _unpack(border, self._border)
        parts = [_unpack(pieces, self._of_chunk) for pieces in chunks]
        return state | {key: torch.cat([part[key] for part in parts], 1) for key in self._of_chunk}


def _kv(spec: Mapping[Key, Spec]) -> dict[Key, Spec]:
    return {key: each for key, each in spec.items() if key.name in ("k", "v")}


def _pack(tensors: Iterable[tuple[Key, Tensor]]) -> list[bytes]:
    # Never empty: in a model without attention a chunk has no tensors, but its item must exist all the same.
    return [batch.SerializeToString() for batch in to_frames(tensors)] or [b""]


def _unpack(pieces: Sequence[bytes], spec: Mapping[Key, Spec]) -> dict[Key, Tensor]:
    assembler = FrameAssembler(spec)
    for piece in pieces:
        try:
            assembler.add(tensor_pb2.FrameBatch.FromString(piece))
        except DecodeError as error:
            raise Incompatible(f"no frames: {error}") from None
    return assembler.finish(CPU)
