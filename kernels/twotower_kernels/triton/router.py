"""The router of a MoE layer in one launch, as a Triton kernel.

A program takes all experts of a token, or of a few where there are many tokens, from the logits in fp64 to the
weights: no score goes through memory.
"""

# Kernels are Triton's language, not Python: no types but tl.constexpr, whose names are written as constants.
# ruff: noqa: N803
# mypy: disable-error-code="import-not-found, import-untyped, no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 8192
"""Products in fp64 that a program holds at once: 64 registers of a thread with 8 warps."""

_MANY = 512
"""Tokens from which programs take several: until then they would leave processors without work, afterwards
reading the weights and widening them to fp64 costs more than the products."""


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
    block_tokens: int | None = None,
) -> tuple[Tensor, Tensor]:
    """As `twotower_kernels.experts.route`, in one launch.

    hidden (N, H) and weight (E, H), fp32, bf16 or fp64, contiguous in H; correction (E,) fp32. Logits, scores and their
    normalisation are fp64. Of equal scores the expert with the lower number comes first, groups alike; `torch.topk`
    leaves that open. NaN counts as the greatest, as there, so that the experts are valid in any case.
    `block_tokens`, a power of two, overrides how many tokens a program takes.

    Returns experts (N, k) int64 and weights (N, k) fp32.
    """
    n, size = hidden.shape
    total = weight.shape[0]
    assert weight.shape == (total, size)
    assert correction.shape == (total,)
    assert total % groups == 0
    assert 1 <= top_groups <= groups
    assert 1 <= top_k <= total
    for tensor in (hidden, weight):
        assert tensor.dtype in (torch.float32, torch.bfloat16, torch.float64)
        assert tensor.stride(1) == 1 or size == 1
    experts = torch.empty(n, top_k, dtype=torch.int64, device=hidden.device)
    weights = torch.empty(n, top_k, dtype=torch.float32, device=hidden.device)
    if n == 0:
        return experts, weights
    if block_tokens is None:
        block_tokens = 4 if n > _MANY else 1
    block_groups, block_each = triton.next_power_of_2(groups), triton.next_power_of_2(total // groups)
    block = max(1, min(triton.next_power_of_2(size), _TILE // (block_tokens * block_groups * block_each)))
    _route_kernel[(triton.cdiv(n, block_tokens),)](
        hidden,
        weight,
        correction.contiguous(),
        experts,
        weights,
        n,
        size,
        hidden.stride(0),
        weight.stride(0),
        SCALE=float(scale),  # a constant, since as an argument it would reach the kernel in fp32
        GROUPS=groups,
        EACH=total // groups,
        TOP_GROUPS=top_groups,
        TOP_K=top_k,
        NORMALIZE=normalize,
        SLOTS=triton.next_power_of_2(top_k),
        BLOCK_TOKENS=block_tokens,
        BLOCK_GROUPS=block_groups,
        BLOCK_EACH=block_each,
        BLOCK=block,
        num_warps=8,
        enable_fp_fusion=True,
    )
    return experts, weights


@triton.jit
def _take_best(key, free, BLOCK: tl.constexpr):
    """Index (M,) of the greatest of key (M, BLOCK) where free, the first of equals, and free without it.

    Some element of each row must be free.
    """
    i = tl.arange(0, BLOCK)[None, :]
    best = tl.max(tl.where(free, key, -float("inf")), 1)
    at = tl.min(tl.where(free & (key == best[:, None]), i, BLOCK), 1)
    return at, free & (i != at[:, None])


@triton.jit
def _widen(v):
    """v in fp64; bf16 by way of fp32, as the interpreter knows no other."""
    if v.dtype == tl.bfloat16:
        v = v.to(tl.float32)
    return v.to(tl.float64)


@triton.jit
def _route_kernel(
    hidden,
    weight,
    correction,
    experts,
    weights,
    n,
    size,
    hidden_row,
    weight_row,
    SCALE: tl.constexpr,
    GROUPS: tl.constexpr,
    EACH: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    TOP_K: tl.constexpr,
    NORMALIZE: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_EACH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: M = BLOCK_TOKENS tokens. Lane e of an axis over experts is e % BLOCK_EACH of group e // BLOCK_EACH."""
    lanes: tl.constexpr = BLOCK_GROUPS * BLOCK_EACH
    token = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    lane = tl.arange(0, lanes)
    group, each = lane // BLOCK_EACH, lane % BLOCK_EACH
    expert = group * EACH + each
    real = (group < GROUPS) & (each < EACH)
    c = tl.arange(0, BLOCK)
    # Tokens and experts that are not there read the first one; nothing of them is kept.
    of_token = hidden + tl.where(token < n, token, 0).to(tl.int64)[:, None] * hidden_row + c[None, :]
    of_expert = weight + tl.where(real, expert, 0).to(tl.int64)[:, None] * weight_row + c[None, :]
    # Sums of each column of tiles, added up only at the end: nothing within the loop waits for other threads.
    acc = tl.zeros((BLOCK_TOKENS, lanes, BLOCK), tl.float64)
    for at in tl.range(0, size, BLOCK, num_stages=3):
        known = (at + c < size)[None, :]
        h = _widen(tl.load(of_token + at, mask=known, other=0.0))
        w = _widen(tl.load(of_expert + at, mask=known, other=0.0))
        acc += h[:, None, :] * w[None, :, :]
    logits = tl.sum(acc, 2)
    small = tl.exp(-tl.abs(logits))  # of the sigmoid's two forms, the one that does not overflow
    scores = tl.where(logits < 0, small, 1.0) / (1.0 + small)
    choice = scores + tl.load(correction + expert, mask=real, other=0.0).to(tl.float64)[None, :]
    choice = tl.where(choice == choice, choice, float("inf"))
    if GROUPS > 1:
        by_group = tl.reshape(choice, (BLOCK_TOKENS * BLOCK_GROUPS, BLOCK_EACH))
        free = tl.broadcast_to((tl.arange(0, BLOCK_EACH) < EACH)[None, :], (BLOCK_TOKENS * BLOCK_GROUPS, BLOCK_EACH))
        _, rest = _take_best(by_group, free, BLOCK_EACH)
        two = tl.max(tl.where(free, by_group, -float("inf")), 1)
        if EACH > 1:
            two += tl.max(tl.where(rest, by_group, -float("inf")), 1)
        two = tl.reshape(tl.where(two == two, two, float("inf")), (BLOCK_TOKENS, BLOCK_GROUPS))
        open_groups = tl.broadcast_to((tl.arange(0, BLOCK_GROUPS) < GROUPS)[None, :], (BLOCK_TOKENS, BLOCK_GROUPS))
        kept = tl.zeros((BLOCK_TOKENS, lanes), tl.int32)
        for _ in tl.static_range(TOP_GROUPS):
            best, open_groups = _take_best(two, open_groups, BLOCK_GROUPS)
            kept = tl.where(group[None, :] == best[:, None], 1, kept)
        choice = tl.where(kept != 0, choice, 0.0)
    slot = tl.arange(0, SLOTS)[None, :]
    chosen = tl.zeros((BLOCK_TOKENS, SLOTS), tl.int32)
    picked = tl.zeros((BLOCK_TOKENS, SLOTS), tl.float64)
    free = tl.broadcast_to(real[None, :], (BLOCK_TOKENS, lanes))
    for k in tl.static_range(TOP_K):
        at, free = _take_best(choice, free, lanes)
        score = tl.sum(tl.where(lane[None, :] == at[:, None], scores, 0.0), 1)
        chosen = tl.where(slot == k, ((at // BLOCK_EACH) * EACH + at % BLOCK_EACH)[:, None], chosen)
        picked = tl.where(slot == k, score[:, None], picked)
    if NORMALIZE:
        picked = picked / (tl.sum(picked, 1) + 1e-20)[:, None]
    to = token.to(tl.int64)[:, None] * TOP_K + slot
    stored = (token < n)[:, None] & (slot < TOP_K)
    tl.store(experts + to, chosen.to(tl.int64), mask=stored)
    tl.store(weights + to, (picked * SCALE).to(tl.float32), mask=stored)
