"""The context tower: frozen, causal. It reads tokens into the state, and alone it is the AR model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from twotower.model.config import ATTENTION, MAMBA, ModelConfig
from twotower.model.layers import Attention, Mamba2, linear
from twotower.model.rows import Rows, StateRows, rows_of
from twotower.model.state import ContextState, Delta, KVDelta, MambaDelta
from twotower.model.tower import Layer, LazyGraph, Tower
from twotower_kernels.block import ScanFactors
from twotower_kernels.kernels import TORCH

Changes = Mapping[int, ScanFactors | KVDelta]
"""By layer, what a commit changed in it; all tensors with a batch axis in front."""


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
    def prefill(self, tokens: Tensor, state: ContextState, *, need_logits: bool = True) -> Tensor | None:
        """Extend `state` by a chunk of a prompt: tokens (L,) int64, L >= 1.

        Returns the logits of the last position (vocab,) fp32, or None where they are not needed.
        """
        state.begin()
        h, _ = self._forward(tokens.unsqueeze(0), [state], prefill=True, need_hidden=need_logits)
        state.length += tokens.shape[0]
        return self.logits(h)[0] if need_logits else None

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
        h, deltas = forward(tokens, states, prefill=False, need_hidden=need_logits)
        for state in states:
            state.length += tokens.shape[1]
        return deltas, self.logits(h) if need_logits else None

    def logits(self, h: Tensor) -> Tensor:
        """h (B, L, hidden) -> (B, vocab) of the last position."""
        logits: Tensor = self.context_lm_head(self.context_tower.norm_f(h[:, -1:]), wide=True)
        return logits[:, 0]

    def _forward(
        self, tokens: Tensor, states: Sequence[ContextState], *, prefill: bool, need_hidden: bool
    ) -> tuple[Tensor, list[Delta]]:
        rows = StateRows(states, self.kernels) if prefill else rows_of(states, self.kernels)
        h, changes = self.forward_rows(tokens, rows, prefill=prefill, need_hidden=need_hidden)
        return h, deltas_of(tokens.shape[1], changes, len(states))

    def forward_rows(self, tokens: Tensor, rows: Rows, *, prefill: bool, need_hidden: bool) -> tuple[Tensor, Changes]:
        """Run the layers over tokens (B, L); update S, conv tails and KV in place, but not the lengths.

        Returns h (B, L, hidden) and, but for a prefill's, what changed. Nothing here waits for the device.
        """
        changes: dict[int, ScanFactors | KVDelta] = {}
        h, x = self.context_tower.embeddings(tokens), None
        for i, layer in enumerate(self.context_tower.layers):
            if not need_hidden and i > self._last_stateful:
                break  # nothing behind it changes the state
            assert isinstance(layer, Layer)
            if x is None:
                x = layer.norm(h)
            else:
                h, x = layer.norm.after(h, x, None, None, layer.order)
            if layer.kind == MAMBA:
                conv, ssm, slots = rows.seed(i)
                if prefill:  # a long chunk: S comes from the chunked scan itself
                    assert slots is None
                    x = _mamba(layer).prefill(x, conv, ssm)
                else:
                    x, changes[i] = _mamba(layer).commit(x, conv, ssm, slots)
                rows.keep(i, conv, ssm)
            elif layer.kind == ATTENTION:
                assert isinstance(layer.mixer, Attention)
                q, k, v = layer.mixer.project(x)
                x = layer.mixer.output(rows.attend(i, q, k, v, causal=True))
                if not prefill:
                    changes[i] = KVDelta(k, v)
            else:
                x = layer.mixer(x)
        assert x is not None
        return h + x, changes


def deltas_of(length: int, changes: Changes, rows: int) -> list[Delta]:
    """What a commit of `length` tokens changed, session by session."""
    return [Delta(length, {i: _row(change, row) for i, change in changes.items()}) for row in range(rows)]


def _row(change: ScanFactors | KVDelta, row: int) -> MambaDelta | KVDelta:
    if isinstance(change, KVDelta):
        return KVDelta(change.k[row], change.v[row])
    return MambaDelta(change.x[row], change.b[row], change.dt[row], change.conv[row])


def _mamba(layer: nn.Module) -> Mamba2:
    assert isinstance(layer, Layer)
    assert isinstance(layer.mixer, Mamba2)
    return layer.mixer
