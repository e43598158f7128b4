"""A commit in two steps: a forward over drafted tokens that changes no state, and the first n of them accepted.

The factors of a commit take S past one position after the other. So any number of the first ones can be
taken, exactly, and the forward need not know in advance how many.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from twotower.model.rows import Rows
from twotower.model.state import KVDelta
from twotower_kernels.block import ScanFactors, tails_after
from twotower_kernels.kernels import Kernels

Changes = Mapping[int, ScanFactors | KVDelta]
"""By layer, what a forward over a block changes in it; all tensors with a batch axis in front."""


@dataclass(frozen=True, slots=True)
class Verified:
    """What a forward over drafted tokens (B, L) found. The states are still those before it."""

    length: int
    """L."""
    changes: Changes
    """Of all L tokens."""
    columns: Mapping[int, Tensor]
    """Mamba layer -> raw xBC of the tokens (B, L, conv_dim), model dtype: a view of in_proj's output, which it keeps alive."""
    logits: Tensor | None
    """(R, L, vocab) fp32: after each of the tokens, of the rows for which they were asked; None where there are none."""


def take_first(
    verified: Verified, counts: Tensor, rows: Rows, decay_rates: Mapping[int, Tensor], kernels: Kernels
) -> dict[int, Tensor]:
    """Take S and conv tails of the rows past their first counts[i] tokens, in place: counts (B,) int64 on the device.

    Each S ends with the bits that the factors of these tokens alone give anywhere. Nothing here waits for the device.
    Returns the new conv tails (B, conv_dim, K) by Mamba layer.
    """
    tails: dict[int, Tensor] = {}
    for i, change in verified.changes.items():
        if isinstance(change, KVDelta):
            continue  # K and V lie behind the length already
        conv, ssm, slots = rows.seed(i)
        before = conv if slots is None else conv.index_select(0, slots)
        tails[i] = tails_after(before, verified.columns[i], counts)
        kernels.apply_factors_(ssm, change.x, change.b, change.dt, decay_rates[i], slots=slots, counts=counts)
        if slots is None:
            conv.copy_(tails[i])
        else:
            conv.index_copy_(0, slots, tails[i])
        rows.keep(i, conv, ssm)
    return tails
