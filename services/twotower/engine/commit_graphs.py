"""Commits and AR steps of the context tower as replays (`engine.graphs`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from twotower.engine.graphs import Graphs, batch_bucket, scratch_ints, state_ints, state_views, token_bucket
from twotower.model.context_tower import ContextTower, deltas_of
from twotower.model.partial import Changes
from twotower.model.pool import StatePool
from twotower.model.rows import PagedRows
from twotower.model.state import ContextState, Delta, KVDelta
from twotower_kernels.block import ScanFactors


@dataclass(frozen=True, slots=True)
class _Committed:
    """What a commit leaves, on the device: as few tensors as there are dtypes, since all must be copied out."""

    changes: Changes
    packed: tuple[Tensor, ...]
    """Of each dtype among the changes, (B, n): a session's tensors one behind the other."""
    logits: Tensor | None
    """(B, V) fp32."""


class CommitGraphs:
    """One graph for each size of batch, block and context."""

    def __init__(self, tower: ContextTower) -> None:
        self._tower = tower
        self._graphs: Graphs[_Committed] = Graphs(tower.device)

    @torch.inference_mode()
    def commit(
        self, pool: StatePool, tokens: Tensor, states: Sequence[ContextState], *, need_logits: bool
    ) -> tuple[list[Delta], Tensor | None]:
        """As `ContextTower.commit`: tokens (B, L) int64 on the host, states of `pool`. What is returned is the caller's own."""
        count, length = tokens.shape
        longest = token_bucket(max(state.length for state in states) + length)  # pages of the block itself, too

        def program(ints: Tensor, reals: Tensor) -> _Committed:
            rows = PagedRows(pool, self._tower.kernels, *state_views(ints[:, length:]), longest)
            h, changes = self._tower.forward_rows(ints[:, :length].contiguous(), rows, need_hidden=need_logits)
            return _Committed(changes, _pack(changes), self._tower.logits(h) if need_logits else None)

        idle = torch.zeros(length, dtype=torch.int64)
        missing = batch_bucket(count) - count
        ints = torch.cat([torch.cat([tokens, idle.expand(missing, -1)]), state_ints(pool, states, longest)], 1)
        reals = torch.zeros(ints.shape[0], 0, dtype=torch.float64)
        key = (length, longest, need_logits)
        out = self._graphs.run(pool, key, program, ints, reals, torch.cat([idle, scratch_ints(pool, longest)]))
        for state in states:
            state.length += length
        # The next replay overwrites all of it, while a delta may still be on its way to a worker.
        own = [packed[:count].clone() for packed in out.packed]
        return deltas_of(length, _unpack(out.changes, own), count), None if out.logits is None else out.logits[:count].clone()


def _tensors(change: ScanFactors | KVDelta) -> Iterator[Tensor]:
    for field in fields(change):
        yield getattr(change, field.name)


def _dtypes(changes: Changes) -> list[torch.dtype]:
    return sorted({tensor.dtype for change in changes.values() for tensor in _tensors(change)}, key=str)


def _pack(changes: Changes) -> tuple[Tensor, ...]:
    """All tensors of each dtype, in order of `_dtypes`, as (B, n)."""
    tensors = [tensor for change in changes.values() for tensor in _tensors(change)]
    return tuple(torch.cat([t.flatten(1) for t in tensors if t.dtype is dtype], 1) for dtype in _dtypes(changes))


def _unpack(changes: Changes, packed: Sequence[Tensor]) -> Changes:
    """Views of `packed` in the shapes of `changes`, for as many rows as it has."""
    left = dict(zip(_dtypes(changes), packed, strict=True))

    def take(like: Tensor) -> Tensor:
        mine, left[like.dtype] = left[like.dtype].split([like[0].numel(), left[like.dtype].shape[1] - like[0].numel()], 1)
        return mine.unflatten(1, like.shape[1:])

    return {i: type(change)(*(take(tensor) for tensor in _tensors(change))) for i, change in changes.items()}
