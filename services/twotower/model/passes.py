"""What a forward of the context tower reads of its sessions' states in each layer, and what it leaves there."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from twotower.model.layers import Attention, Mamba2
from twotower.model.rows import Rows
from twotower.model.state import KVDelta
from twotower_kernels.block import ScanFactors
from twotower_kernels.prefill import Segments


class Pass(Protocol):
    """The layers that need more than their input; all others know no states."""

    def scan(self, layer: int, mixer: Mamba2, x: Tensor) -> Tensor:
        """The output of a Mamba layer for x (B, L, hidden)."""
        ...

    def attend(self, layer: int, mixer: Attention, x: Tensor) -> Tensor:
        """The output of an attention layer for x (B, L, hidden)."""
        ...


class CommitPass:
    """A block, or an AR token, in each row: S and conv tails move past it, K and V are kept, and what changed is noted."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows
        self.changes: dict[int, ScanFactors | KVDelta] = {}
        """By layer; all tensors with a batch axis in front."""

    def scan(self, layer: int, mixer: Mamba2, x: Tensor) -> Tensor:
        """See `Pass`."""
        conv, ssm, slots = self._rows.seed(layer)
        out, self.changes[layer] = mixer.commit(x, conv, ssm, slots)
        self._rows.keep(layer, conv, ssm)
        return out

    def attend(self, layer: int, mixer: Attention, x: Tensor) -> Tensor:
        """See `Pass`."""
        q, k, v = mixer.project(x)
        self.changes[layer] = KVDelta(k, v)
        return mixer.output(self._rows.attend(layer, q, k, v, causal=True))


class VerifyPass(CommitPass):
    """As `CommitPass`, to the same bits, but S and conv tails stay; K and V are put behind the states' lengths."""

    def __init__(self, rows: Rows) -> None:
        super().__init__(rows)
        self.columns: dict[int, Tensor] = {}
        """By Mamba layer: the raw xBC (B, L, conv_dim)."""

    def scan(self, layer: int, mixer: Mamba2, x: Tensor) -> Tensor:
        """See `Pass`."""
        out, self.changes[layer], self.columns[layer] = mixer.verify(x, *self._rows.seed(layer))
        return out


class PrefillPass:
    """Chunks of prompts, one behind the other in a single row (`Segments`): states move past them."""

    def __init__(self, rows: Rows, segments: Segments) -> None:
        self._rows = rows
        self._segments = segments

    def scan(self, layer: int, mixer: Mamba2, x: Tensor) -> Tensor:
        """See `Pass`."""
        conv, ssm, slots = self._rows.seed(layer)
        out = mixer.prefill(x, self._segments, conv, ssm, slots)
        self._rows.keep(layer, conv, ssm)
        return out

    def attend(self, layer: int, mixer: Attention, x: Tensor) -> Tensor:
        """See `Pass`."""
        return mixer.output(self._rows.attend_chunks(layer, *mixer.project(x), self._segments))
