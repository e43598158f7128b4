"""What both towers share: embeddings, layers in the order of the pattern, final norm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, ParamSpec, TypeVar

import torch
from torch import nn

from twotower.model.config import ATTENTION, MAMBA, MOE, ModelConfig
from twotower.model.layers import MLP, Attention, Mamba2, MoE, RMSNorm
from twotower_kernels.norms import Order

Mixer = Mamba2 | Attention | MoE | MLP

P = ParamSpec("P")
R = TypeVar("R")


class Layer(nn.Module):
    """A norm and a mixer; how they are applied differs by tower."""

    def __init__(self, kind: str, config: ModelConfig) -> None:
        super().__init__()
        self.kind = kind
        self.order: Order = "modulate_first" if kind in (MAMBA, ATTENTION) else "norm_first"
        """Of norm and modulation, in the denoiser (docs/model.md, Denoiser tower)."""
        self.norm = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.mixer = _mixer(kind, config)


class Tower(nn.Module):
    """The stack of layers, named as in the checkpoint."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = nn.utils.skip_init(nn.Embedding, config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(kind, config) for kind in config.hybrid_override_pattern)
        self.norm_f = RMSNorm(config.hidden_size, config.layer_norm_epsilon)


class LazyGraph(Generic[P, R]):
    """A forward as a compiled graph, made at its first use: what is never used costs nothing, not even an import.

    Sizes are symbols, so that a growing context compiles nothing anew. Results may differ from the plain
    forward's in the last bits: fused operations round less.
    """

    def __init__(self, forward: Callable[P, R]) -> None:
        self._forward = forward
        self._compiled: Callable[P, R] | None = None

    def get(self) -> Callable[P, R]:
        """The compiled forward."""
        if self._compiled is None:
            self._compiled = torch.compile(self._forward, dynamic=True)
        return self._compiled


def _mixer(kind: str, config: ModelConfig) -> Mixer:
    if kind == MAMBA:
        return Mamba2(config)
    if kind == ATTENTION:
        return Attention(config)
    if kind == MOE:
        return MoE(config)
    return MLP(config.hidden_size, config.intermediate_size)
