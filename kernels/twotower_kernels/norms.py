"""RMSNorm with adaptive shift and scale (adaLN) in both orders, and the gated residual before it.

All arithmetic is fp32, rounded once where a result is stored: a layer that rounds to the model's dtype between
the operations differs from this in the last bits of bf16, and not at all in fp32.

Letters in shapes: B batch, L length, H hidden size.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Order = Literal["modulate_first", "norm_first"]
"""``norm(modulate(h))`` (Mamba, attention) or ``modulate(norm(h))`` (MoE, MLP): docs/model.md, Denoiser tower."""


def modulated_norm(
    h: Tensor, weight: Tensor, eps: float, shift: Tensor | None = None, scale: Tensor | None = None, *, order: Order
) -> Tensor:
    """RMSNorm of h, with ``modulate(h) = h (1 + scale) + shift`` before or after it.

    h (B, L, H), weight (H,), shift and scale (B, 1, H), or both None for the norm alone, in which case the
    order does not matter. Returns (B, L, H) in h's dtype.
    """
    return _modulated_norm(h.float(), weight, eps, shift, scale, order).to(h.dtype)


def add_modulated_norm(
    h: Tensor,
    x: Tensor,
    gate: Tensor | None,
    weight: Tensor,
    eps: float,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    order: Order,
) -> tuple[Tensor, Tensor]:
    """The residual ``h + gate x`` after one layer, and the next layer's `modulated_norm` of it.

    h and x (B, L, H), gate (B, 1, H) or None for 1; the rest as in `modulated_norm`, of the next layer.
    Returns both (B, L, H), in h's dtype. The norm is taken of the residual as stored, after rounding.
    """
    added = (h.float() + (x.float() if gate is None else gate.float() * x.float())).to(h.dtype)
    return added, modulated_norm(added, weight, eps, shift, scale, order=order)


def _modulated_norm(h: Tensor, weight: Tensor, eps: float, shift: Tensor | None, scale: Tensor | None, order: Order) -> Tensor:
    """As `modulated_norm`; h and the result are fp32."""
    assert (shift is None) == (scale is None)
    if shift is None or scale is None:
        return F.rms_norm(h, weight.shape, weight.float(), eps)
    shift, factor = shift.float(), 1 + scale.float()
    if order == "modulate_first":
        return F.rms_norm(torch.addcmul(shift, h, factor), weight.shape, weight.float(), eps)
    return torch.addcmul(shift, F.rms_norm(h, weight.shape, weight.float(), eps), factor)
