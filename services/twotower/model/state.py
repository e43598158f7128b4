"""The context tower's state of one session: all that the next block depends on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from twotower.model.config import ATTENTION, MAMBA, ModelConfig
from twotower_kernels.kernels import TORCH, Kernels

if TYPE_CHECKING:
    from twotower.model.pool import PoolPlace, StatePool

_FIRST_CAPACITY = 256


@dataclass(frozen=True, slots=True)
class MambaState:
    """State of one Mamba layer; both tensors are changed in place."""

    conv: Tensor
    """(conv_dim, K): the last raw xBC columns, newest last, model dtype."""
    ssm: Tensor
    """S, (heads, head_dim, state), fp32."""


class KVState(Protocol):
    """Keys and values of one attention layer, with room behind them.

    A block's own K and V are written into the room, so that attention over [context, block] reads one
    tensor; only the state's length makes them part of it.
    """

    def write(self, start: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Put k and v (kv_heads, L, head_dim) at [start, start + L); returns K and V up to there, not to be written to."""
        ...

    def slice(self, start: int, end: int) -> tuple[Tensor, Tensor]:
        """K and V (kv_heads, end - start, head_dim), not to be written to."""
        ...


class GrowingKV:
    """`KVState` in a tensor of its own that grows."""

    def __init__(self, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
        self._kv = torch.empty(2, kv_heads, 0, head_dim, dtype=dtype, device=device)

    def write(self, start: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """See `KVState`."""
        end = start + k.shape[1]
        self._reserve(end, start)
        self._kv[0, :, start:end] = k
        self._kv[1, :, start:end] = v
        return self.slice(0, end)

    def slice(self, start: int, end: int) -> tuple[Tensor, Tensor]:
        """See `KVState`."""
        return self._kv[0, :, start:end], self._kv[1, :, start:end]

    def _reserve(self, length: int, kept: int) -> None:
        """Make room for `length` tokens in all, keeping the first `kept`."""
        capacity = self._kv.shape[2]
        if length > capacity:
            grown = max(length, 2 * capacity, _FIRST_CAPACITY)
            new = self._kv.new_empty(2, self._kv.shape[1], grown, self._kv.shape[3])
            new[:, :, :kept] = self._kv[:, :, :kept]
            self._kv = new


class PagedKV:
    """`KVState` in pages of a pool: a view where the pages are neighbours, otherwise gathered at every use."""

    def __init__(self, pool: Tensor, pages: Sequence[int], page: int) -> None:
        """pool (2, kv_heads, tokens, head_dim); page number p is tokens [p page, (p + 1) page)."""
        first = pages[0] if pages else 0
        self._room = len(pages) * page
        self._table: Tensor | None = None
        if list(pages) == list(range(first, first + len(pages))):
            self._kv = pool[:, :, first * page : first * page + self._room]
        else:
            self._kv = pool
            starts = torch.tensor(pages, device=pool.device).unsqueeze(1) * page
            self._table = (starts + torch.arange(page, device=pool.device)).flatten()

    def write(self, start: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """See `KVState`."""
        end = start + k.shape[1]
        assert end <= self._room, "more tokens than the session reserved"
        if self._table is None:
            self._kv[0, :, start:end] = k
            self._kv[1, :, start:end] = v
        else:
            self._kv.index_copy_(2, self._table[start:end], torch.stack((k, v)))
        return self.slice(0, end)

    def slice(self, start: int, end: int) -> tuple[Tensor, Tensor]:
        """See `KVState`."""
        if self._table is None:
            return self._kv[0, :, start:end], self._kv[1, :, start:end]
        k, v = self._kv.index_select(2, self._table[start:end]).unbind(0)
        return k, v


@dataclass(slots=True)
class MambaDelta:
    """What a commit changed in one Mamba layer (see `ScanFactors`), of one session: no batch axis."""

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

    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype,
        device: torch.device,
        mamba: Mapping[int, MambaState],
        kv: Mapping[int, KVState],
        pool: StatePool | None = None,
        place: PoolPlace | None = None,
    ) -> None:
        self.config = config
        self.dtype = dtype
        """Of conv tails and KV; S is fp32."""
        self.device = device
        self.length = 0
        self.mamba = mamba
        self.kv = kv
        self.pool = pool
        """Whose slot and pages this is; None: its own tensors."""
        self.place = place

    @classmethod
    def alone(cls, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> ContextState:
        """The state before the first token in tensors of its own, which grow with it."""
        shape = (config.mamba_num_heads, config.mamba_head_dim, config.ssm_state_size)
        mamba = {
            i: MambaState(
                torch.zeros(config.conv_dim, config.conv_kernel, dtype=dtype, device=device), torch.zeros(shape, device=device)
            )
            for i in config.layers_of(MAMBA)
        }
        kv = {i: GrowingKV(config.num_key_value_heads, config.head_dim, dtype, device) for i in config.layers_of(ATTENTION)}
        return cls(config, dtype, device, mamba, kv)

    def begin(self) -> None:
        """Before the first token, clear it: what a pool gives holds what it held. No effect later."""
        if self.length:
            return
        for layer in self.mamba.values():
            layer.conv.zero_()
            layer.ssm.zero_()

    @property
    def slot(self) -> int:
        """Where in its pool it lies; sessions in the order of their slots are read without a copy."""
        return self.place.slot if self.place is not None else 0

    @torch.inference_mode()
    def apply(self, delta: Delta, decay_rates: Mapping[int, Tensor], kernels: Kernels = TORCH) -> None:
        """Extend by a committed block. `decay_rates`: A (heads,) of each Mamba layer *of the context tower*.

        The context and its workers both come here with the same bits and leave with the same bits.
        """
        for i, change in delta.layers.items():
            if isinstance(change, MambaDelta):
                layer = self.mamba[i]
                kernels.apply_factors_(layer.ssm, change.x, change.b, change.dt, decay_rates[i])
                layer.conv.copy_(change.conv)
            else:
                self.kv[i].write(self.length, change.k, change.v)
        self.length += delta.length
