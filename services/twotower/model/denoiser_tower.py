"""The denoising tower: predicts all tokens of a block at once, from the block's known tokens and the context's state."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from twotower.model.config import ModelConfig
from twotower.model.layers import Attention, Mamba2, Modulation, TimestepEmbedder, linear
from twotower.model.rows import Rows, rows_of
from twotower.model.state import ContextState
from twotower.model.tower import Layer, LazyGraph, Tower
from twotower_kernels.kernels import TORCH


class DenoiserTower(nn.Module):
    """Backbone, head and time conditioning. Keys: see `denoiser_tensors`."""

    kernels = TORCH

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        hidden = config.hidden_size
        self.denoiser_tower = Tower(config)
        self.lm_head = linear(hidden, config.vocab_size)
        self.t_embedder = TimestepEmbedder(hidden)
        self.t_block = nn.Sequential(nn.SiLU(), linear(hidden, 3 * hidden, bias=True))
        self.scale_shift_tables = nn.ParameterList(torch.empty(3, hidden) for _ in range(config.num_layers))
        self.compiled = False
        """Whether one block alone goes through a compiled graph, which is made on first use."""
        self._graph = LazyGraph(self._forward)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the residual stream."""
        return self.lm_head.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.lm_head.weight.device

    def modulations(self, t: Tensor) -> list[Modulation]:
        """Shift, scale and gate of every layer for the masked share t (B,) fp32."""
        shared = self.t_block(self.t_embedder(t)).unflatten(-1, (1, 3, -1))  # (B, 1, 3, hidden)
        tables = torch.stack(tuple(self.scale_shift_tables))  # (layers, 3, hidden)
        per_layer = (shared + tables).unsqueeze(3)  # (B, layers, 3, 1, hidden)
        return [Modulation(*(per_layer[:, i, j] for j in range(3))) for i in range(self.config.num_layers)]

    @torch.inference_mode()
    def denoise(self, tokens: Tensor, t: Tensor | None, states: Sequence[ContextState]) -> Tensor:
        """Logits (B, L, vocab) fp32 for all positions of each row's block.

        tokens (B, L) int64 with the mask id where unknown, t (B,) fp32: the masked share of each row, or
        None for no time conditioning (mock-AR), states: each row's context. The states are read, never
        changed. Bidirectional over [context, block] in attention, a forward scan over the block in Mamba.
        """
        forward = self._graph.get() if self.compiled and len(states) == 1 else self._forward
        return forward(tokens, t, states)

    def _forward(self, tokens: Tensor, t: Tensor | None, states: Sequence[ContextState]) -> Tensor:
        return self.forward_rows(tokens, t, rows_of(states, self.kernels))

    def forward_rows(self, tokens: Tensor, t: Tensor | None, rows: Rows) -> Tensor:
        """`denoise` for states in any form; nothing here waits for the device."""
        modulations = None if t is None else self.modulations(t)
        tower = self.denoiser_tower
        h, x, gate = tower.embeddings(tokens), None, None
        for i, layer in enumerate(tower.layers):
            assert isinstance(layer, Layer)
            modulation = None if modulations is None else modulations[i]
            if x is None:
                x = layer.norm.modulated(h, modulation, layer.order)
            else:
                h, x = layer.norm.after(h, x, gate, modulation, layer.order)
            gate = None if modulation is None else modulation.gate
            if isinstance(layer.mixer, Mamba2):
                x = layer.mixer(x, *rows.seed(i))
            elif isinstance(layer.mixer, Attention):
                x = _attention(i, layer.mixer, x, rows)
            else:
                x = layer.mixer(x)
        assert x is not None
        _, x = tower.norm_f.after(h, x, gate, None, "norm_first")
        logits: Tensor = self.lm_head(x, wide=True)
        return logits


def _attention(i: int, mixer: Attention, x: Tensor, rows: Rows) -> Tensor:
    q, k, v = mixer.project(x)
    return mixer.output(rows.attend(i, q, k, v, causal=False))
