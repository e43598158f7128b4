"""Confidence unmasking: from a forward's logits to the positions that are committed in this step."""

from __future__ import annotations

from collections.abc import Callable
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


def draw(
    logits: Tensor, temperature: Tensor, uniforms: Tensor, top_k: Tensor | None = None, top_p: Tensor | None = None
) -> Tensor:
    """Tokens (N,) int64 from logits (N, V) fp32: argmax where temperature (N,) <= 0, else one draw each.

    uniforms (N,) fp64 in [0, 1). top_k (N,) int64, 0: all; top_p (N,) fp64 in (0, 1], of what top_k leaves; None where
    no row asks for them. The draw inverts the cumulative distribution, in fp64, so that a seed
    gives the same token on every device and beside every neighbour.
    """
    tokens = logits.argmax(-1)
    hot = (temperature > 0).nonzero().squeeze(-1)
    if hot.numel():
        p = (logits[hot].double() / temperature[hot].double().unsqueeze(-1)).softmax(-1)
        if top_k is not None and top_p is not None:
            p = _likeliest(p, top_k[hot], top_p[hot])
        p = p.cumsum(-1)
        target = uniforms[hot].unsqueeze(-1) * p[:, -1:]
        tokens[hot] = torch.searchsorted(p, target, right=True).squeeze(-1).clamp_max(logits.shape[-1] - 1)
    return tokens


def _likeliest(p: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """p (N, V) fp64 with 0 for all but the likeliest; not normalised. Of equal tokens the first is the likelier."""
    ordered, tokens = p.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(p.shape[-1], device=p.device)
    kept = (rank < top_k.unsqueeze(-1)) | (top_k <= 0).unsqueeze(-1)
    mass = ordered * kept
    before = mass.cumsum(-1) - mass
    kept &= (before < top_p.unsqueeze(-1) * mass.sum(-1, keepdim=True)) | (top_p >= 1).unsqueeze(-1)
    return torch.zeros_like(p).scatter_(-1, tokens, ordered * kept)


Predict = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None], tuple[Tensor, Tensor]]
"""See `predict`."""


def predict(
    logits: Tensor, masked: Tensor, temperature: Tensor, uniforms: Tensor, top_k: Tensor | None, top_p: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Tokens (N,) as in `draw`, at least where masked (N,), and their probabilities (N,) fp32 at temperature 1."""
    predicted = draw(logits, temperature, uniforms, top_k, top_p)
    at = logits.gather(-1, predicted.unsqueeze(-1)).squeeze(-1)
    return predicted, (at - logits.logsumexp(-1)).exp()


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
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
    predict: Predict = predict,
) -> Unmasked:
    """One step of a batch of blocks (docs/model.md, Block refinement).

    logits (B, L, V) fp32, overwritten; tokens (B, L) int64; masked (B, L) bool; gamma, temperature (B,);
    steps_left (B,) int64, this step included; uniforms (B, L) fp64; top_k, top_p (B,): see `draw`; predict: another form
    of the function of that name. Each row has at least one masked position.

    Commits, of each row, the ``max(1, #{confidence > gamma}, ceil(masked / steps_left))`` most confident masked
    positions; of equal confidences, those further back. Confidence is the untempered probability of the
    predicted token, with the mask id excluded.
    """
    batch, length, vocab = logits.shape
    assert tokens.shape == masked.shape == uniforms.shape == (batch, length)
    assert gamma.shape == steps_left.shape == temperature.shape == (batch,)
    logits[..., mask_id] = -torch.inf
    flat = logits.view(-1, vocab)
    choice = (None if x is None else x.repeat_interleave(length) for x in (top_k, top_p))
    predicted, confidence = (
        x.view(batch, length)
        for x in predict(flat, masked.flatten(), temperature.repeat_interleave(length), uniforms.flatten(), *choice)
    )
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
