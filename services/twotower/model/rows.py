"""A batch of sessions as the towers see it: each layer's states, a row for each session, wherever they lie."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from twotower.model.pool import PAGE, StatePool
from twotower.model.state import ContextState
from twotower_kernels.kernels import Kernels
from twotower_kernels.prefill import Segments


class Rows(Protocol):
    """States of B sessions; `length` tokens of each lie before the block that is computed."""

    def seed(self, layer: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Conv tails (B, conv_dim, K) and S (B, heads, head_dim, state) of a Mamba layer; slots None.

        Or the whole pool's, with the slots (B,) int64 of the rows.
        """
        ...

    def keep(self, layer: int, conv: Tensor, ssm: Tensor) -> None:
        """Take over what was changed of a `seed`, if that was a copy."""
        ...

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
        """A block's attention over [context, block]: q (B, heads, L, d), k and v (B, kv_heads, L, d) -> (B, heads, L, d).

        Every position sees the whole block, and k and v are forgotten; or, `causal`, those up to its own, and they are kept.
        """
        ...

    def attend_chunks(self, layer: int, q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
        """Causal attention of chunks of prompts, one of each session: q (1, heads, N, d), k and v alike, which are kept.

        Returns (1, heads, N, d).
        """
        ...


def rows_of(states: Sequence[ContextState], kernels: Kernels) -> Rows:
    """The form that the kernels read fastest. States in any order."""
    pool = states[0].pool
    if kernels.paged and pool is not None and all(state.pool is pool for state in states):
        return PagedRows.of(pool, states, kernels)
    return StateRows(states, kernels)


class StateRows:
    """Sessions one by one where they lie; those of one pool together where a layer can take them so."""

    def __init__(self, states: Sequence[ContextState], kernels: Kernels) -> None:
        """States in any order; those of one pool are read and changed where they lie."""
        self._states = states
        self._kernels = kernels
        self._pool: StatePool | None = None
        self._first = 0
        self._slots: Tensor | None = None
        pool = states[0].pool
        slots = [state.place.slot for state in states if state.place is not None and state.pool is pool]
        if len(states) > 1 and pool is not None and len(slots) == len(states):
            self._pool, self._first = pool, slots[0]
            if slots != list(range(slots[0], slots[0] + len(slots))):
                self._slots = torch.tensor(slots, device=pool.device)

    def seed(self, layer: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """See `Rows`."""
        if len(self._states) == 1:
            only = self._states[0].mamba[layer]
            return only.conv.unsqueeze(0), only.ssm.unsqueeze(0), None
        if self._pool is None:
            mine = [state.mamba[layer] for state in self._states]
            return torch.stack([state.conv for state in mine]), torch.stack([state.ssm for state in mine]), None
        conv, ssm = self._pool.conv[layer], self._pool.ssm[layer]
        if self._slots is not None:
            return conv, ssm, self._slots
        here = slice(self._first, self._first + len(self._states))
        return conv[here], ssm[here], None

    def keep(self, layer: int, conv: Tensor, ssm: Tensor) -> None:
        """See `Rows`."""
        if len(self._states) > 1 and self._pool is None:
            for row, state in enumerate(self._states):
                state.mamba[layer].conv.copy_(conv[row])
                state.mamba[layer].ssm.copy_(ssm[row])

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
        """See `Rows`. K and V are written behind each state's own length either way: room that no one else reads."""
        rows = []
        for row, state in enumerate(self._states):
            keys, values = state.kv[layer].write(state.length, k[row], v[row])
            one = self._kernels.attend(q[row : row + 1], keys.unsqueeze(0), values.unsqueeze(0), causal=causal)
            rows.append(one)
        return rows[0] if len(rows) == 1 else torch.cat(rows)

    def attend_chunks(self, layer: int, q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
        """See `Rows`. Laid out as (1, N, heads, d), so that joining the heads is a view."""
        out = q.new_empty(1, q.shape[2], q.shape[1], q.shape[3]).transpose(1, 2) if len(self._states) > 1 else q
        for state, (start, end) in zip(self._states, segments.spans, strict=True):
            keys, values = state.kv[layer].write(state.length, k[0, :, start:end], v[0, :, start:end])
            one = self._kernels.attend(q[:, :, start:end], keys.unsqueeze(0), values.unsqueeze(0), causal=True)
            if len(self._states) == 1:
                return one
            out[:, :, start:end] = one
        return out


class PagedRows:
    """Sessions of one pool, named by numbers on the device alone: nothing on the host depends on which they are.

    So a captured graph serves any sessions whose slots, pages and lengths are put where it reads them.
    """

    def __init__(
        self, pool: StatePool, kernels: Kernels, slots: Tensor, table: Tensor, lengths: Tensor, longest: int | None = None
    ) -> None:
        """slots (B,) int64; table (B, width) int32, the pages of each; lengths (B,) int32.

        `longest`: no length is greater; None: what the table's width can hold.
        """
        self._pool = pool
        self._kernels = kernels
        self._slots = slots
        self._table = table
        self._lengths = lengths
        self._longest = longest
        self._places: Tensor | None = None

    @classmethod
    def of(cls, pool: StatePool, states: Sequence[ContextState], kernels: Kernels) -> PagedRows:
        """Of the sessions that have these states."""
        slots, table, lengths = (numbers.to(pool.device) for numbers in pool.numbers(states))
        return cls(pool, kernels, slots, table, lengths, max(state.length for state in states))

    def seed(self, layer: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """See `Rows`."""
        return self._pool.conv[layer], self._pool.ssm[layer], self._slots

    def keep(self, layer: int, conv: Tensor, ssm: Tensor) -> None:
        """See `Rows`."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
        """See `Rows`."""
        k_pages, v_pages = self._pool.pages(layer)
        out = self._kernels.attention(
            q, k, v, k_pages, v_pages, self._table, self._lengths, causal=causal, max_length=self._longest
        )
        if causal:
            written = torch.stack((k, v)).transpose(1, 2).flatten(2, 3)  # (2, kv_heads, B L, d)
            self._pool.kv[layer].index_copy_(2, self._behind(q.shape[2]), written)
        return out

    def attend_chunks(self, layer: int, q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
        """See `Rows`. K and V are put into the pages first: attention then reads nothing else."""
        self._pool.kv[layer].index_copy_(2, self._chunk_places(segments), torch.cat((k, v)))
        out = self._kernels.prompt_attention(q[0], *self._pool.pages(layer), self._table, self._lengths, segments)
        return out.unsqueeze(0)

    def _chunk_places(self, segments: Segments) -> Tensor:
        """Where in the pool the chunks behind the contexts lie: (N,) int64."""
        if self._places is None:
            rows, places = segments.numbers
            at = self._lengths.long()[rows] + places
            self._places = self._table.long()[rows, at // PAGE] * PAGE + at % PAGE
        return self._places

    def _behind(self, length: int) -> Tensor:
        """Where in the pool the `length` tokens behind each context lie: (B L,) int64."""
        if self._places is None:
            at = self._lengths.long().unsqueeze(1) + torch.arange(length, device=self._lengths.device)
            self._places = (self._table.long().gather(1, at // PAGE) * PAGE + at % PAGE).flatten()
        return self._places
