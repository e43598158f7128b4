"""The context tower: frozen, causal. It reads tokens into the state, and alone it is the AR model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from twotower.model.config import ATTENTION, MAMBA, ModelConfig
from twotower.model.delta_batch import DeltaBatch
from twotower.model.layers import Attention, Mamba2, linear
from twotower.model.partial import Changes, Verified, take_first
from twotower.model.passes import CommitPass, Pass, PrefillPass, VerifyPass
from twotower.model.rows import Rows, rows_of
from twotower.model.state import ContextState, Delta
from twotower.model.tower import Layer, LazyGraph, Tower
from twotower_kernels.block import ScanFactors
from twotower_kernels.kernels import TORCH
from twotower_kernels.prefill import Segments


class ContextTower(nn.Module):
    """Backbone and AR head. Keys: ``context_tower.*``, ``context_lm_head.weight``."""

    kernels = TORCH

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.context_tower = Tower(config)
        self.context_lm_head = linear(config.hidden_size, config.vocab_size)
        stateful = (*config.layers_of(MAMBA), *config.layers_of(ATTENTION))
        self._last_stateful = max(stateful, default=-1)
        self.compiled = False
        """Whether one session's commits and AR steps go through compiled graphs, which are made on first use."""
        self._graph = LazyGraph(self._forward)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the residual stream, the conv tails and the KV."""
        return self.context_lm_head.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.context_lm_head.weight.device

    def new_state(self) -> ContextState:
        """The state before the first token, in tensors of its own."""
        return ContextState.alone(self.config, self.dtype, self.device)

    def decay_rates(self) -> dict[int, Tensor]:
        """A (heads,) fp32 of each Mamba layer; a worker needs them to apply deltas."""
        return {i: _mamba(self.context_tower.layers[i]).decay_rate() for i in self.config.layers_of(MAMBA)}

    @torch.inference_mode()
    def prefill(
        self, chunks: Sequence[Tensor], states: Sequence[ContextState], *, need_logits: bool | Sequence[bool] = True
    ) -> list[Tensor | None]:
        """Extend each state by a chunk of its prompt, all chunks in one forward.

        chunks: (L_i,) int64 each, of any lengths L_i >= 1; states, distinct, of any lengths; need_logits: for each
        chunk, or for all. Returns for each the logits of its last position (vocab,) fp32, or None where they are not needed.

        What a chunk comes to, its logits and its state, does not depend on those beside it. To the bit that holds
        for the C++ kernels in bf16, where the model's sizes fit all of them, as the shipped checkpoint's do; there it does
        not depend on where a prompt is cut into chunks either, if that is at multiples of 64 tokens. In
        plain torch, in any dtype, and on a GPU the products are a library's, which choose the order of
        their sums by the number of rows: there, last bits may differ.
        """
        assert len(chunks) == len(states)
        needed = [need_logits] * len(chunks) if isinstance(need_logits, bool) else need_logits
        for state in states:
            state.begin()
        segments = Segments([chunk.shape[0] for chunk in chunks], self.device)
        tokens = chunks[0] if len(chunks) == 1 else torch.cat(tuple(chunks))
        lasts = [end - 1 for end, need in zip(segments.ends, needed, strict=True) if need]
        wanted = torch.tensor(lasts, device=self.device) if lasts else None
        h = self._run(tokens.unsqueeze(0), PrefillPass(rows_of(states, self.kernels), segments), wanted)
        for state, length in zip(states, segments.lengths, strict=True):
            state.length += length
        logits = iter(self._head(h)[0] if lasts else ())
        return [next(logits) if need else None for need in needed]

    @torch.inference_mode()
    def read(self, chunks: Sequence[Tensor], states: Sequence[ContextState]) -> Tensor:
        """As `prefill`, for callers that need every position.

        Returns h (sum of L_i, hidden), of which `logits(h[i:j].unsqueeze(1))` makes logits: those of all positions may be
        more than there is memory for.
        """
        assert len(chunks) == len(states)
        for state in states:
            state.begin()
        segments = Segments([chunk.shape[0] for chunk in chunks], self.device)
        h = self._run(torch.cat(tuple(chunks)).unsqueeze(0), PrefillPass(rows_of(states, self.kernels), segments), slice(None))
        for state, length in zip(states, segments.lengths, strict=True):
            state.length += length
        return h[0]

    @torch.inference_mode()
    def commit(
        self, tokens: Tensor, states: Sequence[ContextState], *, need_logits: bool = False
    ) -> tuple[list[Delta], Tensor | None]:
        """Extend each state by its row of tokens (B, L), in one forward: a finished block, or an AR token.

        Returns what changed, per row, and the logits of the last position (B, vocab) fp32 where needed.
        The states change by the deltas alone (`ContextState.apply`), as they will on a worker.
        """
        for state in states:
            state.begin()
        forward = self._graph.get() if self.compiled and len(states) == 1 else self._forward
        h, deltas = forward(tokens, states, need_hidden=need_logits)
        for state in states:
            state.length += tokens.shape[1]
        return deltas, self.logits(h) if need_logits else None

    @torch.inference_mode()
    def verify(self, tokens: Tensor, states: Sequence[ContextState], *, need_logits: bool | Sequence[bool] = True) -> Verified:
        """Run a forward over drafted tokens (B, L), of which `accept` then takes the first of each row.

        The states stay as they are, but for K and V behind their lengths, which nobody else reads: no other forward may
        run over these states before they accept. need_logits: for each row, or for all: the logits after every token
        of these rows (R, L, vocab) fp32 are returned, in the order of the rows.
        """
        for state in states:
            state.begin()
        needed = [need_logits] * len(states) if isinstance(need_logits, bool) else need_logits
        rows = [row for row, need in enumerate(needed) if need]
        verify = VerifyPass(rows_of(states, self.kernels))
        h = self._run(tokens, verify, slice(None) if rows else None)
        if rows and len(rows) < len(states):
            h = h[torch.tensor(rows, device=h.device)]
        return Verified(tokens.shape[1], verify.changes, verify.columns, self._head(h) if rows else None)

    @torch.inference_mode()
    def accept(self, states: Sequence[ContextState], verified: Verified, counts: Sequence[int]) -> DeltaBatch:
        """Extend each state by its first counts[i] of the L tokens that were verified, 1 <= counts[i] <= L.

        states: those of `verify`, in its order. Returns what changed. A worker that applies it has the
        context's bits; with all L tokens they are those of `commit` (but for a compiled graph's, see `LazyGraph`).
        Steps of one token, or commits in other pieces, give the same but for the order of sums in
        the forward, on which the factors depend: about 1e-6 of a value in fp32.
        """
        assert len(counts) == len(states)
        assert all(1 <= count <= verified.length for count in counts)
        kept = torch.tensor(counts, device=self.device)
        rates = {i: _mamba(self.context_tower.layers[i]).scan_weights().a for i in verified.columns}
        tails = take_first(verified, kept, rows_of(states, self.kernels), rates, self.kernels)
        for state, count in zip(states, counts, strict=True):
            state.length += count
        layers = {
            i: ScanFactors(change.x, change.b, change.dt, tails[i]) if isinstance(change, ScanFactors) else change
            for i, change in verified.changes.items()
        }
        return DeltaBatch(verified.length, layers, tuple(counts))

    @torch.inference_mode()
    def accept_all(self, states: Sequence[ContextState], verified: Verified) -> DeltaBatch:
        """As `accept` of all L tokens, to the bits of `commit`; the deltas stay together."""
        rows = rows_of(states, self.kernels)
        for i, change in verified.changes.items():
            if isinstance(change, ScanFactors):
                conv, ssm, slots = rows.seed(i)
                a = _mamba(self.context_tower.layers[i]).scan_weights().a
                self.kernels.apply_factors_(ssm, change.x, change.b, change.dt, a, slots=slots)
                if slots is None:
                    conv.copy_(change.conv)
                else:
                    conv.index_copy_(0, slots, change.conv)
                rows.keep(i, conv, ssm)
        for state in states:
            state.length += verified.length
        return DeltaBatch(verified.length, verified.changes)

    def logits(self, h: Tensor) -> Tensor:
        """h (B, L, hidden) -> (B, vocab) of the last position."""
        return self._head(h[:, -1:])[:, 0]

    def _head(self, h: Tensor) -> Tensor:
        """h (B, L, hidden) -> logits (B, L, vocab) fp32."""
        logits: Tensor = self.context_lm_head(self.context_tower.norm_f(h), wide=True)
        return logits

    def _forward(self, tokens: Tensor, states: Sequence[ContextState], *, need_hidden: bool) -> tuple[Tensor, list[Delta]]:
        h, changes = self.forward_rows(tokens, rows_of(states, self.kernels), need_hidden=need_hidden)
        batch = DeltaBatch(tokens.shape[1], changes)
        return h, [batch.row(row) for row in range(len(states))]

    def forward_rows(self, tokens: Tensor, rows: Rows, *, need_hidden: bool) -> tuple[Tensor, Changes]:
        """Run the layers over tokens (B, L); update S, conv tails and KV in place, but not the lengths.

        Returns h (B, L, hidden) and what changed. Nothing here waits for the device.
        """
        commit = CommitPass(rows)
        h = self._run(tokens, commit, slice(None) if need_hidden else None)
        return h, commit.changes

    def _run(self, tokens: Tensor, states: Pass, wanted: Tensor | slice | None) -> Tensor:
        """Run the layers over tokens (B, L). Returns h (B, wanted, hidden) of the positions `wanted`; None: of no use."""
        h, x = self.context_tower.embeddings(tokens), None
        for i, layer in enumerate(self.context_tower.layers):
            if i == self._last_stateful + 1:
                if wanted is None:
                    break  # nothing from here on changes a state
                h, x = h[:, wanted], None if x is None else x[:, wanted]
            assert isinstance(layer, Layer)
            if x is None:
                x = layer.norm(h)
            else:
                h, x = layer.norm.after(h, x, None, None, layer.order)
            if layer.kind == MAMBA:
                assert isinstance(layer.mixer, Mamba2)
                x = states.scan(i, layer.mixer, x)
            elif layer.kind == ATTENTION:
                assert isinstance(layer.mixer, Attention)
                x = states.attend(i, layer.mixer, x)
            else:
                x = layer.mixer(x)
        assert x is not None
        out: Tensor = h + x
        ended_stateful = self._last_stateful == len(self.context_tower.layers) - 1
        return out[:, wanted] if ended_stateful and wanted is not None else out


def _mamba(layer: nn.Module) -> Mamba2:
    assert isinstance(layer, Layer)
    assert isinstance(layer.mixer, Mamba2)
    return layer.mixer
