"""What one commit forward changed, for all of its sessions at once: the unit that travels, and that a worker applies."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from twotower.model.pool import PAGE, StatePool
from twotower.model.state import ContextState, Delta, KVDelta, MambaDelta
from twotower_kernels.block import ScanFactors
from twotower_kernels.kernels import TORCH, Kernels

Change = ScanFactors | KVDelta


@dataclass(frozen=True, slots=True)
class DeltaBatch:
    """The deltas of B sessions whose blocks shared a commit."""

    length: int
    """Positions of each row."""
    layers: Mapping[int, Change]
    """By layer; all tensors with the axis of the rows in front, as the forward made them. Nobody writes to them."""
    counts: tuple[int, ...] | None = None
    """How many of the first positions of each row were taken into the state; None: all of every row."""

    @classmethod
    def of(cls, delta: Delta) -> DeltaBatch:
        """A batch of one."""
        layers: dict[int, Change] = {}
        for i, change in delta.layers.items():
            parts = [getattr(change, field.name).unsqueeze(0) for field in fields(change)]
            layers[i] = KVDelta(*parts) if isinstance(change, KVDelta) else ScanFactors(*parts)
        return cls(delta.length, layers)

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for change in self.layers.values() for tensor in _tensors(change))

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return next((tensor.device for change in self.layers.values() for tensor in _tensors(change)), torch.device("cpu"))

    def select(self, rows: Sequence[int]) -> DeltaBatch:
        """The rows of some sessions, in the order given, and no more positions than these rows take.

        A copy, unless these are all of them in their order, with all positions.
        """
        counts = None if self.counts is None else tuple(self.counts[row] for row in rows)
        length = self.length if counts is None else max(counts, default=0)
        first = next((tensor for change in self.layers.values() for tensor in _tensors(change)), None)
        if first is None or (list(rows) == list(range(first.shape[0])) and length == self.length):
            return self if counts == self.counts else DeltaBatch(length, self.layers, counts)
        at = torch.tensor(rows, dtype=torch.int64, device=first.device)
        layers = {i: _map(_first(change, length), lambda t: t.index_select(0, at)) for i, change in self.layers.items()}
        return DeltaBatch(length, layers, counts)

    def row(self, row: int) -> Delta:
        """One session's delta, as views."""
        count = self.length if self.counts is None else self.counts[row]
        return Delta(count, {i: _row(_first(change, count), row) for i, change in self.layers.items()})


@torch.inference_mode()
def apply_batch(
    states: Sequence[ContextState], deltas: DeltaBatch, decay_rates: Mapping[int, Tensor], kernels: Kernels = TORCH
) -> None:
    """Extend each state by its row: the same bits as `ContextState.apply` row by row, in few operations for one pool.

    decay_rates: A (heads,) fp32 of each Mamba layer of the context tower.
    """
    pool = states[0].pool
    if pool is None or any(state.pool is not pool for state in states):
        for row, state in enumerate(states):
            state.apply(deltas.row(row), decay_rates, kernels)
        return
    slots = torch.tensor([state.slot for state in states], device=pool.device)
    places = _behind(pool, states, deltas.length)
    counts = None if deltas.counts is None else torch.tensor(deltas.counts, device=pool.device)
    for i, change in deltas.layers.items():
        if isinstance(change, ScanFactors):
            kernels.apply_factors_(pool.ssm[i], change.x, change.b, change.dt, decay_rates[i], slots=slots, counts=counts)
            pool.conv[i].index_copy_(0, slots, change.conv)
        else:
            written = torch.stack((change.k, change.v)).transpose(1, 2).flatten(2, 3)  # (2, kv_heads, B L, d)
            pool.kv[i].index_copy_(2, places, written)
    for row, state in enumerate(states):
        state.length += deltas.length if deltas.counts is None else deltas.counts[row]


def _behind(pool: StatePool, states: Sequence[ContextState], length: int) -> Tensor:
    """Where in the pool the `length` tokens behind each state lie: (B L,) int64."""
    for state in states:  # pages that it has not are others' in the table
        assert state.place is not None
        assert state.length + length <= len(state.place.pages) * PAGE, "more tokens than the session reserved"
    _, table, lengths = pool.numbers(states)
    at = lengths.long().unsqueeze(1) + torch.arange(length)
    return (table.long().gather(1, at // PAGE) * PAGE + at % PAGE).flatten().to(pool.device)


def _tensors(change: Change) -> Iterator[Tensor]:
    return (getattr(change, field.name) for field in fields(change))


def _map(change: Change, of: Callable[[Tensor], Tensor]) -> Change:
    return type(change)(*map(of, _tensors(change)))


def _first(change: Change, length: int) -> Change:
    """The first `length` positions of every row, as views; a conv tail has no positions."""
    if isinstance(change, KVDelta):
        return KVDelta(change.k[:, :, :length], change.v[:, :, :length])
    return ScanFactors(change.x[:, :length], change.b[:, :length], change.dt[:, :length], change.conv)


def _row(change: Change, row: int) -> MambaDelta | KVDelta:
    if isinstance(change, KVDelta):
        return KVDelta(change.k[row], change.v[row])
    return MambaDelta(change.x[row], change.b[row], change.dt[row], change.conv[row])
