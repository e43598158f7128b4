"""The router of a MoE layer: logits in fp64, then everything else in one launch, as Triton kernels.

The logits of many tokens are the library's product of matrices, which has tensor cores for fp64. Those of few are a launch of
our own that spreads experts and inputs over the whole device, where a library's tiles would leave most of it idle. The
choice takes a token a program, from the logits to the weights: no score goes through memory.
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

_TILE_EXPERTS = 8
"""Experts that a program handles."""

_MAX_SPLITS = 16
"""The most programs that share the inputs of a token: the choice holds their sums in registers."""

_FEW = 128
"""The most tokens for which our own product is used (on an H100: 22 us against the library's 24, and 52 against 33 at 512)."""


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
    library: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """As `twotower_kernels.experts.route`, in two launches.

    hidden (N, H) and weight (E, H), fp32, bf16 or fp64, contiguous in H; correction (E,) fp32. Logits, scores and their
    normalisation are fp64. Of equal scores the expert with the lower number comes first, groups alike; `torch.topk`
    leaves that open. NaN counts as the greatest, as there, so that the experts are valid in any case.
    `library` overrides whether the logits are the library's, `block_tokens`, a power of two, how many tokens a program of
    our own takes.

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
    if n > _FEW if library is None else library:
        parts = (hidden.double() @ weight.double().t()).unsqueeze(1)
    else:
        parts = _logits(hidden, weight, block_tokens)
    block_groups, block_each = triton.next_power_of_2(groups), triton.next_power_of_2(total // groups)
    _choose_kernel[(n,)](
        parts,
        correction.contiguous(),
        experts,
        weights,
        SCALE=float(scale),  # a constant, since as an argument it would reach the kernel in fp32
        GROUPS=groups,
        EACH=total // groups,
        TOP_GROUPS=top_groups,
        TOP_K=top_k,
        NORMALIZE=normalize,
        SPLITS=parts.shape[1],
        SLOTS=triton.next_power_of_2(top_k),
        BLOCK_GROUPS=block_groups,
        BLOCK_EACH=block_each,
        num_warps=max(1, min(8, block_groups * block_each // 128)),  # of 128 experts, four a thread: warps exchange nothing
        enable_fp_fusion=True,
    )
    return experts, weights


def _logits(hidden: Tensor, weight: Tensor, block_tokens: int | None) -> Tensor:
    """Partial sums over the inputs, (N, splits, E) fp64, which add up to the logits."""
    n, size = hidden.shape
    total = weight.shape[0]
    tokens = min(16, triton.next_power_of_2(n)) if block_tokens is None else block_tokens
    block = max(1, min(256, triton.next_power_of_2(size), _TILE // (tokens * _TILE_EXPERTS)))
    tiles = triton.cdiv(n, tokens) * triton.cdiv(total, _TILE_EXPERTS)
    # Two programs a multiprocessor, as far as the inputs can be divided.
    wanted = max(1, min(_MAX_SPLITS, 264 // tiles, triton.cdiv(size, block)))
    share = triton.cdiv(triton.cdiv(size, block), wanted)
    splits = triton.cdiv(triton.cdiv(size, block), share)
    parts = torch.empty(n, splits, total, dtype=torch.float64, device=hidden.device)
    _logits_kernel[(triton.cdiv(n, tokens), triton.cdiv(total, _TILE_EXPERTS), splits)](
        hidden,
        weight,
        parts,
        n,
        total,
        size,
        share * block,
        hidden.stride(0),
        weight.stride(0),
        BLOCK_TOKENS=tokens,
        BLOCK_EXPERTS=_TILE_EXPERTS,
        BLOCK=block,
        num_warps=8,
        enable_fp_fusion=True,
    )
    return parts


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
    """v in fp64; bf16 goes through fp32, since the interpreter has no direct cast."""
    if v.dtype == tl.bfloat16:
        v = v.to(tl.float32)
    return v.to(tl.float64)


@triton.jit
def _logits_kernel(
    hidden,
    weight,
    parts,
    n,
    experts,
    size,
    share,
    hidden_row,
    weight_row,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_EXPERTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: some experts of some tokens, over one share of the inputs."""
    token = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    expert = tl.program_id(1) * BLOCK_EXPERTS + tl.arange(0, BLOCK_EXPERTS)
    split = tl.program_id(2)
    c = tl.arange(0, BLOCK)
    # Lanes beyond the last token or expert read the first one, and their results are dropped.
    of_token = hidden + tl.where(token < n, token, 0).to(tl.int64)[:, None] * hidden_row + c[None, :]
    of_expert = weight + tl.where(expert < experts, expert, 0).to(tl.int64)[:, None] * weight_row + c[None, :]
    # Each column of tiles has its own sum, and these are added only at the end: no thread waits for others in the loop.
    acc = tl.zeros((BLOCK_TOKENS, BLOCK_EXPERTS, BLOCK), tl.float64)
    for at in tl.range(split * share, tl.minimum((split + 1) * share, size), BLOCK, num_stages=3):
        known = (at + c < size)[None, :]
        h = _widen(tl.load(of_token + at, mask=known, other=0.0))
        w = _widen(tl.load(of_expert + at, mask=known, other=0.0))
        acc += h[:, None, :] * w[None, :, :]
    to = (token.to(tl.int64)[:, None] * tl.num_programs(2) + split) * experts + expert[None, :]
    tl.store(parts + to, tl.sum(acc, 2), mask=(token < n)[:, None] & (expert < experts)[None, :])


@triton.jit
def _choose_kernel(
    parts,
    correction,
    experts,
    weights,
    SCALE: tl.constexpr,
    GROUPS: tl.constexpr,
    EACH: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    TOP_K: tl.constexpr,
    NORMALIZE: tl.constexpr,
    SPLITS: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_EACH: tl.constexpr,
):
    """One program: one token. Lane e of the axis over experts is e % BLOCK_EACH of group e // BLOCK_EACH."""
    lanes: tl.constexpr = BLOCK_GROUPS * BLOCK_EACH
    token = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, lanes)
    group, each = lane // BLOCK_EACH, lane % BLOCK_EACH
    expert = group * EACH + each
    real = (group < GROUPS) & (each < EACH)
    logits = tl.zeros((1, lanes), tl.float64)
    for split in tl.static_range(SPLITS):
        part = tl.load(parts + (token * SPLITS + split) * (GROUPS * EACH) + expert, mask=real, other=0.0)
        logits += part[None, :]
    small = tl.exp(-tl.abs(logits))  # of the sigmoid's two forms, the one that does not overflow
    scores = tl.where(logits < 0, small, 1.0) / (1.0 + small)
    choice = scores + tl.load(correction + expert, mask=real, other=0.0).to(tl.float64)[None, :]
    choice = tl.where(choice == choice, choice, float("inf"))
    if GROUPS > 1:
        by_group = tl.reshape(choice, (BLOCK_GROUPS, BLOCK_EACH))
        free = tl.broadcast_to((tl.arange(0, BLOCK_EACH) < EACH)[None, :], (BLOCK_GROUPS, BLOCK_EACH))
        _, rest = _take_best(by_group, free, BLOCK_EACH)
        two = tl.max(tl.where(free, by_group, -float("inf")), 1)
        if EACH > 1:
            two += tl.max(tl.where(rest, by_group, -float("inf")), 1)
        two = tl.reshape(tl.where(two == two, two, float("inf")), (1, BLOCK_GROUPS))
        open_groups = tl.broadcast_to((tl.arange(0, BLOCK_GROUPS) < GROUPS)[None, :], (1, BLOCK_GROUPS))
        kept = tl.zeros((1, lanes), tl.int32)
        for _ in tl.static_range(TOP_GROUPS):
            best, open_groups = _take_best(two, open_groups, BLOCK_GROUPS)
            kept = tl.where(group[None, :] == best[:, None], 1, kept)
        choice = tl.where(kept != 0, choice, 0.0)
    slot = tl.arange(0, SLOTS)[None, :]
    chosen = tl.zeros((1, SLOTS), tl.int32)
    picked = tl.zeros((1, SLOTS), tl.float64)
    free = tl.broadcast_to(real[None, :], (1, lanes))
    for k in tl.static_range(TOP_K):
        at, free = _take_best(choice, free, lanes)
        score = tl.sum(tl.where(lane[None, :] == at[:, None], scores, 0.0), 1)
        chosen = tl.where(slot == k, ((at // BLOCK_EACH) * EACH + at % BLOCK_EACH)[:, None], chosen)
        picked = tl.where(slot == k, score[:, None], picked)
    if NORMALIZE:
        picked = picked / (tl.sum(picked, 1) + 1e-20)[:, None]
    to = token * TOP_K + slot
    tl.store(experts + to, chosen.to(tl.int64), mask=slot < TOP_K)
    tl.store(weights + to, (picked * SCALE).to(tl.float32), mask=slot < TOP_K)
