"""Routing and the routed experts of a MoE layer, without a loop over the experts or a device sync for each of them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def relu2(x: Tensor) -> Tensor:
    """relu(x) squared."""
    return F.relu(x).square()


def route(
    hidden: Tensor,
    weight: Tensor,
    correction: Tensor,
    *,
    top_k: int,
    groups: int,
    top_groups: int,
    normalize: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Choose experts for each token (docs/model.md, MoE router).

    hidden (N, H), weight (E, H), correction (E,). Logits in fp64, sigmoid scores; the choice is made on
    scores + correction, limited to the best groups; the weights are the uncorrected scores.
    Returns experts (N, k) int64 and weights (N, k) fp32.
    """
    scores = (hidden.double() @ weight.double().t()).sigmoid()
    choice = scores + correction
    if groups > 1:
        per_group = choice.unflatten(-1, (groups, -1))
        best_two = per_group.topk(min(2, per_group.shape[-1]), dim=-1).values.sum(-1)
        kept = torch.zeros_like(best_two, dtype=torch.bool)
        kept.scatter_(-1, best_two.topk(top_groups, dim=-1).indices, True)
        choice = per_group.masked_fill(~kept.unsqueeze(-1), 0.0).flatten(-2)
    experts = choice.topk(top_k, dim=-1).indices
    weights = scores.gather(-1, experts)
    if normalize:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return experts, (weights * scale).float()


def grouped_experts(hidden: Tensor, experts: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Sum over a token's experts of weight * down(relu2(up(x))), one grouped product per projection.

    hidden (N, H), experts (N, k) int64, weights (N, k) fp32, up (E, I, H), down (E, H, I).
    Returns (N, H) fp32. No device sync: group borders stay on the device.
    """
    n, top_k = experts.shape
    assert weights.shape == (n, top_k)
    assert up.shape == (down.shape[0], down.shape[2], down.shape[1])
    order = experts.flatten().argsort(stable=True)
    rows = order // top_k
    counts = torch.zeros(up.shape[0], dtype=torch.int32, device=hidden.device)
    counts.scatter_add_(0, experts.flatten(), torch.ones_like(order, dtype=torch.int32))
    ends = counts.cumsum(0, dtype=torch.int32)
    mid = relu2(F.grouped_mm(hidden[rows], up.transpose(1, 2), offs=ends))
    out = F.grouped_mm(mid, down.transpose(1, 2), offs=ends).float()
    out = out * weights.flatten()[order].unsqueeze(-1)
    # Back to (token, choice) order, then one sum: the order of addition does not depend on the batch.
    back = torch.empty_like(out)
    back[order] = out
    return back.view(n, top_k, -1).sum(1)


def active_experts(hidden: Tensor, experts: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """As `grouped_experts`, for one token on a CPU: reads only its k experts, in place. hidden (1, H)."""
    assert hidden.shape[0] == 1
    out = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
    for expert, weight in zip(experts[0].tolist(), weights[0].tolist(), strict=True):
        out.add_(F.linear(relu2(F.linear(hidden, up[expert])), down[expert]), alpha=weight)
    return out


def gathered_experts(hidden: Tensor, experts: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """As `grouped_experts`, for one token in a compiled graph: gathers its k experts, and reads no value on the host."""
    assert hidden.shape[0] == 1
    mid = relu2(up[experts[0]] @ hidden[0])
    out = (down[experts[0]] @ mid.unsqueeze(-1)).squeeze(-1).float()
    return (out * weights[0].unsqueeze(-1)).sum(0, keepdim=True)


DENSE_WASTE = 8
DENSE_ROWS = 64
"""On a CPU in bf16, all experts as one wide product beat a grouped one while there are at most `DENSE_WASTE` experts for
each that a token needs, and at most `DENSE_ROWS` tokens (2.1x at 16 tokens, 8 experts, 2 a token; in fp32 it never pays)."""


def wide_down(down: Tensor, top_k: int) -> Tensor | None:
    """down (E, H, I) laid out for `dense_experts` as (H, E I), a copy; None where that form does not pay."""
    if down.device.type != "cpu" or down.dtype is not torch.bfloat16 or down.shape[0] > DENSE_WASTE * top_k:
        return None
    return down.permute(1, 0, 2).flatten(1).contiguous()


def dense_experts(hidden: Tensor, experts: Tensor, weights: Tensor, up: Tensor, wide: Tensor) -> Tensor:
    """As `grouped_experts`, through all experts in two products; those not chosen have weight 0. wide (H, E I): `wide_down`."""
    gates = torch.zeros(hidden.shape[0], up.shape[0], dtype=torch.float32, device=hidden.device)
    gates = gates.scatter(1, experts, weights)
    mid = relu2(F.linear(hidden, up.flatten(0, 1))).unflatten(1, up.shape[:2])
    return F.linear((mid.float() * gates.unsqueeze(-1)).to(hidden.dtype).flatten(1), wide).float()


def all_experts(hidden: Tensor, experts: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """As `grouped_experts`, through all experts: differentiable, and the reference for the other forms."""
    mid = relu2(torch.einsum("nh,eih->nei", hidden, up))
    out = torch.einsum("nei,ehi->neh", mid, down).float()
    gates = torch.zeros(hidden.shape[0], up.shape[0], dtype=torch.float32, device=hidden.device)
    gates = gates.scatter(1, experts, weights)
    return torch.einsum("neh,ne->nh", out, gates)


def run_experts(
    hidden: Tensor, experts: Tensor, weights: Tensor, up: Tensor, down: Tensor, wide: Tensor | None = None
) -> Tensor:
    """Runs the fastest form for the input. Shapes as in `grouped_experts`; wide: what `wide_down` returned for `down`."""
    if torch.is_grad_enabled() and (up.requires_grad or hidden.requires_grad):
        return all_experts(hidden, experts, weights, up, down)
    if torch.compiler.is_compiling():
        return _compiled_experts(hidden, experts, weights, up, down, wide)
    if hidden.shape[0] == 1 and hidden.device.type == "cpu":
        return active_experts(hidden, experts, weights, up, down)
    if wide is not None and hidden.shape[0] <= DENSE_ROWS:
        return dense_experts(hidden, experts, weights, up, wide)
    return grouped_experts(hidden, experts, weights, up, down)


def _compiled_experts(
    hidden: Tensor, experts: Tensor, weights: Tensor, up: Tensor, down: Tensor, wide: Tensor | None
) -> Tensor:
    """Runs the form that compiles to the fastest graph: torch's own products, unless they would read too many weights."""
    if hidden.shape[0] == 1 and hidden.device.type == "cpu":
        return gathered_experts(hidden, experts, weights, up, down)
    if wide is not None and hidden.shape[0] <= DENSE_ROWS:
        return dense_experts(hidden, experts, weights, up, wide)
    if hidden.dtype is not torch.bfloat16:
        return all_experts(hidden, experts, weights, up, down)  # the compiler knows the grouped product in bf16 only
    return grouped_experts(hidden, experts, weights, up, down)
