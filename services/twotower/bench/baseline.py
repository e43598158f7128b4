"""The plain way to run the model, kept as a yardstick: it does what the published script does.

It uses torch's own products, a loop over all experts of a layer with a sync for each to see whether it has tokens, and a
copy of the whole state for every block, and serves one request at a time. Its tokens are the engine's, except for rounding.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from twotower.engine.context_engine import ContextEngine
from twotower.engine.denoiser_engine import DenoiserEngine
from twotower.model.layers import MoE, use_kernels
from twotower.model.tower import Layer, Tower
from twotower.request import GenerationParams
from twotower_kernels.experts import relu2
from twotower_kernels.kernels import TORCH


class LoopedMoE(nn.Module):
    """A MoE layer that runs its experts one after another."""

    def __init__(self, moe: MoE) -> None:
        super().__init__()
        self.moe = moe

    def forward(self, h: Tensor) -> Tensor:
        """(B, L, hidden) -> (B, L, hidden)."""
        flat = h.flatten(0, -2)
        experts, weights = self.moe.gate(flat)
        routed = torch.zeros(flat.shape, dtype=torch.float32, device=flat.device)
        for e in range(self.moe.experts.up_proj.shape[0]):
            rows, choices = torch.where(experts == e)
            if rows.numel() > 0:
                out = F.linear(relu2(F.linear(flat[rows], self.moe.experts.up_proj[e])), self.moe.experts.down_proj[e])
                routed.index_add_(0, rows, out.float() * weights[rows, choices].unsqueeze(-1))
        shared: Tensor = self.moe.shared_experts(h)
        return routed.to(h.dtype).view_as(h) + shared


def make_plain(tower: nn.Module) -> None:
    """Change this tower to loop over experts, and to multiply with torch alone."""
    use_kernels(tower, TORCH)
    for module in tower.modules():
        if isinstance(module, Tower):
            _loop_over_experts(module)


def _loop_over_experts(tower: Tower) -> None:
    for layer in tower.layers:
        assert isinstance(layer, Layer)
        if isinstance(layer.mixer, MoE):
            layer.mixer = LoopedMoE(layer.mixer)  # type: ignore[assignment]  # same call, same result


def generate_plain(
    context: ContextEngine, denoiser: DenoiserEngine, prompt: Sequence[int], params: GenerationParams
) -> list[int]:
    """Generate from one prompt with plain towers (`make_plain`)."""
    session = context.open("plain", list(prompt), params)
    while session.prefill_left:
        context.prefill(session, len(prompt))
    tokens: list[int] = []
    while session.finish_reason is None:
        block = denoiser.start(params, copy.deepcopy(session.state), session.generated)
        while not block.done:
            denoiser.step([block])
        written = block.tokens.tolist()
        tokens += session.emit(written)
        if session.finish_reason is None:
            context.commit([(session, written)])
    return tokens
