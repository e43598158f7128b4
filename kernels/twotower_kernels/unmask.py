"""Confidence unmasking: from a forward's logits to the positions that are committed in this step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(slots=True)
class Unmasked:
    """The block after a step. B rows, L positions."""

    tokens: Tensor
    """(B, L) int64; still the mask id where masked."""
    masked: Tensor
    """(B, L) bool."""
    finite: Tensor
    """(B,) bool: False where a confidence was NaN, which must fail the row's request."""


def draw(logits: Tensor, temperature: Tensor, uniforms: Tensor) -> Tensor:
    """Tokens (N,) int64 from logits (N, V) fp32: argmax where temperature (N,) <= 0, else one draw each.

    uniforms (N,) fp64 in [0, 1). The draw inverts the cumulative distribution, in fp64, so that a seed
    gives the same token on every device and beside every neighbour.
    """
    tokens = logits.argmax(-1)
    hot = (temperature > 0).nonzero().squeeze(-1)
    if hot.numel():
        p = (logits[hot].double() / temperature[hot].double().unsqueeze(-1)).softmax(-1).cumsum(-1)
        target = uniforms[hot].unsqueeze(-1) * p[:, -1:]
        tokens[hot] = torch.searchsorted(p, target, right=True).squeeze(-1).clamp_max(logits.shape[-1] - 1)
    return tokens


def unmask(
    logits: Tensor,
    tokens: Tensor,
    masked: Tensor,
    *,
    mask_id: int,
    gamma: Tensor,
    steps_left: Tensor,
    temperature: Tensor,
    uniforms: Tensor,
) -> Unmasked:
    """One step of a batch of blocks (model.md, Block refinement).

    logits (B, L, V) fp32, overwritten; tokens (B, L) int64; masked (B, L) bool; gamma, temperature (B,);
    steps_left (B,) int64, this step included; uniforms (B, L) fp64. Each row has at least one masked position.

    Commits, of each row, the ``max(1, #{confidence > gamma}, ceil(masked / steps_left))`` most confident masked
    positions; of equal confidences, those further back. Confidence is the untempered probability of the
    predicted token, with the mask id excluded.
    """
    batch, length, vocab = logits.shape
    assert tokens.shape == masked.shape == uniforms.shape == (batch, length)
    assert gamma.shape == steps_left.shape == temperature.shape == (batch,)
    logits[..., mask_id] = -torch.inf
    flat = logits.view(-1, vocab)
    predicted = draw(flat, temperature.repeat_interleave(length), uniforms.flatten()).view(batch, length)
    confidence = (logits.gather(-1, predicted.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)).exp()
    finite = (confidence.isfinite() | ~masked).all(-1)
    left = masked.sum(-1)
    sure = (masked & (confidence > gamma.unsqueeze(-1))).sum(-1)
    due = (left + steps_left - 1) // steps_left
    count = torch.maximum(sure, due).clamp_min(1).minimum(left)
    # Ascending and stable, so the lowest stay masked; what is not masked sorts below all.
    order = confidence.masked_fill(~masked, -1.0).argsort(dim=-1, stable=True)
    rank = torch.empty_like(order).scatter_(-1, order, torch.arange(length, device=order.device).expand_as(order))
    chosen = rank >= (length - count).unsqueeze(-1)
    return Unmasked(torch.where(chosen, predicted, tokens), masked & ~chosen, finite)
