"""The context tower's state of one session: all that the next block depends on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from twotower.model.config import ATTENTION, MAMBA, ModelConfig
from twotower_kernels.scan import apply_factors

_FIRST_CAPACITY = 256


@dataclass(slots=True)
class MambaState:
    """State of one Mamba layer."""

    conv: Tensor
    """(conv_dim, K): the last raw xBC columns, newest last, model dtype."""
    ssm: Tensor
    """S, (heads, head_dim, state), fp32."""


class KVState:
    """Keys and values of one attention layer, with room behind them.

    A block's own K and V are written into the room, so that attention over [context, block] reads one
    view; only `advance` makes them part of the state.
    """

    def __init__(self, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
        self._kv = torch.empty(2, kv_heads, 0, head_dim, dtype=dtype, device=device)

    def reserve(self, length: int, kept: int) -> None:
        """Make room for `length` tokens in all, keeping the first `kept`."""
        capacity = self._kv.shape[2]
        if length > capacity:
            grown = max(length, 2 * capacity, _FIRST_CAPACITY)
            new = self._kv.new_empty(2, self._kv.shape[1], grown, self._kv.shape[3])
            new[:, :, :kept] = self._kv[:, :, :kept]
            self._kv = new

    def write(self, start: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Put k and v (kv_heads, L, head_dim) at [start, start + L); returns K and V up to there, as views."""
        end = start + k.shape[1]
        self.reserve(end, start)
        self._kv[0, :, start:end] = k
        self._kv[1, :, start:end] = v
        return self._kv[0, :, :end], self._kv[1, :, :end]

    def slice(self, start: int, end: int) -> tuple[Tensor, Tensor]:
        """K and V (kv_heads, end - start, head_dim), as views."""
        return self._kv[0, :, start:end], self._kv[1, :, start:end]


@dataclass(slots=True)
class MambaDelta:
    """What a commit changed in one Mamba layer (see `MambaFactors`), of one session: no batch axis."""

    x: Tensor
    b: Tensor
    dt: Tensor
    conv: Tensor


@dataclass(slots=True)
class KVDelta:
    """K and V of the committed tokens in one attention layer, (kv_heads, L, head_dim)."""

    k: Tensor
    v: Tensor


@dataclass(slots=True)
class Delta:
    """The difference between the state before and after a block, as factors: lossless and small."""

    length: int
    """Tokens committed."""
    layers: Mapping[int, MambaDelta | KVDelta]


class ContextState:
    """State after `length` tokens, per layer: conv tail and S, or K and V."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        self.config = config
        self.dtype = dtype
        """Of conv tails and KV; S is fp32."""
        self.device = device
        self.length = 0
        self.mamba: dict[int, MambaState] = {}
        self.kv: dict[int, KVState] = {}
        for i in config.layers_of(MAMBA):
            conv = torch.zeros(config.conv_dim, config.conv_kernel, dtype=dtype, device=device)
            ssm = torch.zeros(config.mamba_num_heads, config.mamba_head_dim, config.ssm_state_size, device=device)
            self.mamba[i] = MambaState(conv, ssm)
        for i in config.layers_of(ATTENTION):
            self.kv[i] = KVState(config.num_key_value_heads, config.head_dim, dtype, device)

    @torch.inference_mode()
    def apply(self, delta: Delta, decay_rates: Mapping[int, Tensor]) -> None:
        """Extend by a committed block. `decay_rates`: A (heads,) of each Mamba layer *of the context tower*.

        The context and its workers both come here with the same bits and leave with the same bits.
        """
        for i, change in delta.layers.items():
            if isinstance(change, MambaDelta):
                layer = self.mamba[i]
                layer.ssm = apply_factors(layer.ssm, change.x, change.b, change.dt, decay_rates[i])
                layer.conv = change.conv
            else:
                self.kv[i].write(self.length, change.k, change.v)
        self.length += delta.length
