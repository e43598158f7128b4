"""Preallocated states of many sessions: slots for conv tails and S, pages for K and V, sized from a memory budget.

A session reserves at its start all that it can ever need, so that memory never runs out in the middle of one:
what does not fit is not admitted. KV is small beside S here (6 KB a token, 50 MB a slot at the published size),
which is why a reservation for tokens that may never be written costs little.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from twotower.errors import ConfigError, Overloaded
from twotower.model.config import ATTENTION, MAMBA, ModelConfig
from twotower.model.state import ContextState, KVState, MambaState, PagedKV

PAGE = 64
"""Tokens of a KV page."""


def slot_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """Conv tails and S of one session, all Mamba layers."""
    ssm = config.mamba_num_heads * config.mamba_head_dim * config.ssm_state_size * 4
    return len(config.layers_of(MAMBA)) * (ssm + config.conv_dim * config.conv_kernel * dtype.itemsize)


def page_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """K and V of `PAGE` tokens, all attention layers."""
    return len(config.layers_of(ATTENTION)) * 2 * config.num_key_value_heads * PAGE * config.head_dim * dtype.itemsize


def pages_for(tokens: int) -> int:
    """Pages that hold so many tokens."""
    return -(-tokens // PAGE)


@dataclass(frozen=True, slots=True)
class PoolSize:
    """How much a pool holds."""

    slots: int
    pages: int

    @classmethod
    def within(
        cls, config: ModelConfig, dtype: torch.dtype, budget: int, *, max_slots: int, max_tokens: int, row_bytes: int = 0
    ) -> PoolSize:
        """The largest pool of at most `max_slots` sessions and `max_tokens` tokens each that `budget` bytes hold.

        Each slot comes with pages for an equal share of what the slots leave, up to `max_tokens`; of too many
        sessions with too little room each, fewer are taken until every one could hold a quarter of `max_tokens`.
        row_bytes: what a forward needs besides for each session in it, such as its logits.
        Raises ConfigError if not even one session of one page fits.
        """
        per_slot, per_page = slot_bytes(config, dtype) + row_bytes, page_bytes(config, dtype)
        whole = pages_for(max_tokens)
        least = per_page * max(1, whole // 4)
        slots = min(max_slots, budget // (per_slot + least)) or min(max_slots, 1)
        pages = min((budget - slots * per_slot) // per_page, slots * whole) if per_page else slots * whole
        if pages < 1:
            raise ConfigError(
                f"state_memory: {budget} bytes hold no session; one needs at least {per_slot + per_page} with this model"
            )
        return cls(slots, pages)


@dataclass(frozen=True, slots=True)
class PoolPlace:
    """What a session holds of a pool."""

    slot: int
    pages: tuple[int, ...]


class StatePool:
    """Tensors of all slots and pages of one tower's process; which are free is known here alone. Not thread-safe."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device, size: PoolSize) -> None:
        """Allocates everything at once; on a CPU the system provides the memory when it is first written to."""
        self.config = config
        self.dtype = dtype
        self.device = device
        self.size = size
        heads = (config.mamba_num_heads, config.mamba_head_dim, config.ssm_state_size)
        self.scratch = PoolPlace(size.slots, (size.pages,))
        """One slot and page more, nobody's: rows that fill up a batch compute there."""
        self.conv: dict[int, Tensor] = {}
        """Mamba layer -> (slots + 1, conv_dim, K), model dtype."""
        self.ssm: dict[int, Tensor] = {}
        """Mamba layer -> (slots + 1, heads, head_dim, state), fp32."""
        self.kv: dict[int, Tensor] = {}
        """Attention layer -> (2, kv_heads, (pages + 1) PAGE, head_dim), model dtype: a page is `PAGE` of the third axis."""
        for i in config.layers_of(MAMBA):
            self.conv[i] = torch.empty(size.slots + 1, config.conv_dim, config.conv_kernel, dtype=dtype, device=device)
            self.ssm[i] = torch.empty(size.slots + 1, *heads, device=device)
        for i in config.layers_of(ATTENTION):
            shape = (2, config.num_key_value_heads, (size.pages + 1) * PAGE, config.head_dim)
            self.kv[i] = torch.empty(shape, dtype=dtype, device=device)
        for tensor in (*self.conv.values(), *self.ssm.values()):
            tensor[self.scratch.slot].zero_()
        # The lowest first, so that those in use lie together: a batch of neighbours is a view, not a copy.
        self._slots = list(range(size.slots))
        self._free_pages = bytearray(b"\1" * size.pages)
        self._mamba: dict[int, dict[int, MambaState]] = {}
        """Views of the slots that have been used."""

    @property
    def used_slots(self) -> int:
        """Slots that sessions hold."""
        return self.size.slots - len(self._slots)

    @property
    def used_pages(self) -> int:
        """Pages that sessions hold."""
        return self.size.pages - self.free_pages

    @property
    def free_pages(self) -> int:
        """Pages that no session holds."""
        return self._free_pages.count(1)

    def ever_fits(self, tokens: int) -> bool:
        """Whether a session of so many tokens would fit an empty pool."""
        return pages_for(tokens) <= self.size.pages

    def fits(self, tokens: int) -> bool:
        """Whether a session of so many tokens fits now."""
        return bool(self._slots) and pages_for(tokens) <= self.free_pages

    def acquire(self, tokens: int) -> ContextState:
        """A state with room for `tokens`, of length 0. Raises Overloaded.

        Its tensors hold what they held: who computes behind it calls `begin` first, which is left to the thread that computes.
        """
        if not self.fits(tokens):
            raise Overloaded(
                f"the state of {tokens} more tokens does not fit: {len(self._slots)} of {self.size.slots} slots"
                f" and {self.free_pages} of {self.size.pages} pages are free"
            )
        place = PoolPlace(heapq.heappop(self._slots), self._take_pages(pages_for(tokens)))
        mamba = self._mamba.get(place.slot)
        if mamba is None:
            mamba = {i: MambaState(self.conv[i][place.slot], self.ssm[i][place.slot]) for i in self.conv}
            self._mamba[place.slot] = mamba
        kv: dict[int, KVState] = {i: PagedKV(tensor, place.pages, PAGE) for i, tensor in self.kv.items()}
        return ContextState(self.config, self.dtype, self.device, mamba, kv, self, place)

    def pages(self, layer: int) -> tuple[Tensor, Tensor]:
        """K and V of an attention layer as (pages, kv_heads, PAGE, head_dim) each, views."""
        k, v = self.kv[layer].unflatten(2, (-1, PAGE)).transpose(1, 2).unbind(0)
        return k, v

    def numbers(self, states: Sequence[ContextState]) -> tuple[Tensor, Tensor, Tensor]:
        """Where states of this pool lie: slots (B,) int64, pages (B, width) int32, 0 behind the last, lengths (B,) int32.

        All on the host.
        """
        places = [state.place for state in states if state.place is not None]
        assert len(places) == len(states)
        table = torch.zeros(len(places), max(1, *(len(place.pages) for place in places)), dtype=torch.int32)
        for row, place in enumerate(places):
            table[row, : len(place.pages)] = torch.tensor(place.pages, dtype=torch.int32)
        lengths = torch.tensor([state.length for state in states], dtype=torch.int32)
        return torch.tensor([place.slot for place in places]), table, lengths

    def release(self, state: ContextState) -> None:
        """Take a state of this pool back; it must not be used afterwards."""
        assert state.pool is self
        assert state.place is not None
        heapq.heappush(self._slots, state.place.slot)
        for page in state.place.pages:
            self._free_pages[page] = 1
        state.pool = state.place = None

    def _take_pages(self, count: int) -> tuple[int, ...]:
        """A run of neighbours where there is one: attention then reads a view. Otherwise the lowest that are free."""
        start = self._free_pages.find(b"\1" * count)
        if start >= 0:
            taken = list(range(start, start + count))
        else:
            taken = [page for page, free in enumerate(self._free_pages) if free][:count]
        for page in taken:
            self._free_pages[page] = 0
        return tuple(taken)
