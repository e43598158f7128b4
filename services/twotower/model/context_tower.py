"""The context tower: frozen, causal. It reads tokens into the state, and alone it is the AR model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from twotower.model.config import ATTENTION, MAMBA, ModelConfig
from twotower.model.layers import Attention, Mamba2, linear
from twotower.model.rows import Rows, StateRows, rows_of
from twotower.model.state import ContextState, Delta, KVDelta, MambaDelta
from twotower.model.tower import Layer, LazyGraph, Tower
from twotower_kernels.kernels import TORCH


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
        h, _ = self._forward(tokens.unsqueeze(0), [state], prefill=True, need_hidden=need_logits)
        state.length += tokens.shape[0]
        return self._logits(h)[0] if need_logits else None

    @torch.inference_mode()
    def commit(
        self, tokens: Tensor, states: Sequence[ContextState], *, need_logits: bool = False
    ) -> tuple[list[Delta], Tensor | None]:
        """Extend each state by its row of tokens (B, L), in one forward: a finished block, or an AR token.

        Returns what changed, per row, and the logits of the last position (B, vocab) fp32 where needed.
        The states change by the deltas alone (`ContextState.apply`), as they will on a worker.
        """
        forward = self._graph.get() if self.compiled and len(states) == 1 else self._forward
        h, deltas = forward(tokens, states, prefill=False, need_hidden=need_logits)
        for state in states:
            state.length += tokens.shape[1]
        return deltas, self._logits(h) if need_logits else None

    def _logits(self, h: Tensor) -> Tensor:
        """h (B, L, hidden) -> (B, vocab) of the last position."""
        logits: Tensor = self.context_lm_head(self.context_tower.norm_f(h[:, -1:]), wide=True)
        return logits[:, 0]

    def _forward(
        self, tokens: Tensor, states: Sequence[ContextState], *, prefill: bool, need_hidden: bool
    ) -> tuple[Tensor, list[Delta]]:
        rows = StateRows(states) if prefill else rows_of(states, self.kernels)
        return self.forward_rows(tokens, rows, prefill=prefill, need_hidden=need_hidden)

    def forward_rows(self, tokens: Tensor, rows: Rows, *, prefill: bool, need_hidden: bool) -> tuple[Tensor, list[Delta]]:
        """Run the layers; update S, conv tails and KV in place, but not the lengths. Nothing here waits for the device."""
        changes: list[dict[int, MambaDelta | KVDelta]] = [{} for _ in tokens]
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
                x = self._mamba(i, _mamba(layer), x, rows, None if prefill else changes)
            elif layer.kind == ATTENTION:
                x = _attention(i, layer.mixer, x, rows, changes)
            else:
                x = layer.mixer(x)
        assert x is not None
        return h + x, [Delta(tokens.shape[1], change) for change in changes]

    def _mamba(
        self, i: int, mixer: Mamba2, x: Tensor, rows: Rows, changes: list[dict[int, MambaDelta | KVDelta]] | None
    ) -> Tensor:
        conv, ssm, slots = rows.seed(i)
        if changes is None:  # a long chunk: S comes from the chunked scan itself
            assert slots is None
            out = mixer.prefill(x, conv, ssm)
        else:
            out, f = mixer.commit(x, conv, ssm, slots)
            for row, of_row in enumerate(changes):
                of_row[i] = MambaDelta(f.x[row], f.b[row], f.dt[row], f.conv[row])
        rows.keep(i, conv, ssm)
        return out


def _attention(i: int, mixer: nn.Module, x: Tensor, rows: Rows, changes: list[dict[int, MambaDelta | KVDelta]]) -> Tensor:
    assert isinstance(mixer, Attention)
    q, k, v = mixer.project(x)
    out = rows.attend(i, q, k, v, mixer.attend, causal=True)
    for row, of_row in enumerate(changes):
        of_row[i] = KVDelta(k[row], v[row])
    return mixer.output(out)


def _mamba(layer: nn.Module) -> Mamba2:
    assert isinstance(layer, Layer)
    assert isinstance(layer.mixer, Mamba2)
    return layer.mixer
