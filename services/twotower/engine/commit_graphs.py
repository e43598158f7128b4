"""Commits and AR steps of the context tower as replays (`engine.graphs`)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import partial

import torch
from torch import Tensor

from twotower.engine.graphs import (
    Graphs,
    Program,
    WarmUp,
    scratch_ints,
    state_ints,
    state_views,
    token_bucket,
    warm_up,
)
from twotower.model.context_tower import ContextTower
from twotower.model.delta_batch import DeltaBatch
from twotower.model.partial import Changes
from twotower.model.pool import StatePool
from twotower.model.rows import PagedRows
from twotower.model.state import ContextState, KVDelta
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
    """One graph for each size of batch, block and context; of blocks those of the trained size, and single tokens."""

    def __init__(self, tower: ContextTower) -> None:
        self._tower = tower
        self._graphs: Graphs[_Committed] = Graphs(tower.device)

    @torch.inference_mode()
    def commit(
        self,
        pool: StatePool,
        tokens: Tensor,
        states: Sequence[ContextState],
        *,
        need_logits: bool,
        need_deltas: bool = True,
    ) -> tuple[DeltaBatch, Tensor | None]:
        """As `ContextEngine.extend`: tokens (B, L) int64 on the host, states of `pool`. The results are the caller's own.

        Without need_deltas there are none: nobody waits for those of an AR step.
        """
        count, length = tokens.shape
        longest = token_bucket(max(state.length for state in states) + length)  # pages of the block itself, too
        numbers, idle = state_ints(pool, states, longest), _idle(pool, length, longest)
        ints = torch.cat([torch.cat([tokens, idle[:length].expand(numbers.shape[0] - count, -1)]), numbers], 1)
        reals = torch.zeros(ints.shape[0], 0, dtype=torch.float64)
        key = (length, longest, need_logits, need_deltas)
        program = self._program(pool, *key)
        common = length in (1, self._tower.config.block_size)
        out = self._graphs.run(pool, key, program, ints, reals, idle, common=common)
        for state in states:
            state.length += length
        # The next replay overwrites all of it, while a delta may still be on its way to a worker.
        logits = None if out.logits is None else out.logits[:count].clone()
        if not need_deltas:
            return DeltaBatch(length, {}), logits
        own = [packed[:count].clone() for packed in out.packed]
        return DeltaBatch(length, _unpack(out.changes, own)), logits

    @torch.inference_mode()
    def warm_up(
        self, pool: StatePool, *, batches: Iterable[int], contexts: Iterable[int], block_size: int | None, ar: bool
    ) -> WarmUp:
        """Compile and capture before the first request, at scratch places of `pool`: no session's state is touched.

        batches, contexts: of rows and of tokens, as `batch_buckets` and `token_buckets` list them. block_size: of commits, None
        for none; ar: single tokens with logits as well.
        """
        lengths = [] if block_size is None else [(block_size, False)]
        if ar:
            lengths.append((1, True))
        sizes = [(length, logits, longest, batch) for length, logits in lengths for longest in contexts for batch in batches]

        def prepare(length: int, need_logits: bool, longest: int, batch: int) -> bool:
            key = (length, longest, need_logits, not need_logits)
            return self._graphs.prepare(pool, key, self._program(pool, *key), batch, 0, _idle(pool, length, longest))

        return warm_up(partial(prepare, *size) for size in sizes)

    def _program(self, pool: StatePool, length: int, longest: int, need_logits: bool, need_deltas: bool) -> Program[_Committed]:
        def program(ints: Tensor, reals: Tensor) -> _Committed:
            rows = PagedRows(pool, self._tower.kernels, *state_views(ints[:, length:]), longest)
            h, changes = self._tower.forward_rows(ints[:, :length].contiguous(), rows, need_hidden=need_logits)
            kept: Changes = changes if need_deltas else {}
            return _Committed(kept, _pack(kept), self._tower.logits(h) if need_logits else None)

        return program


def _idle(pool: StatePool, length: int, longest: int) -> Tensor:
    """A row that nobody reads: token 0, at the scratch place."""
    return torch.cat([torch.zeros(length, dtype=torch.int64), scratch_ints(pool, longest)])


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
