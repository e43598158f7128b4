"""Attention of a block over paged context KV and the block's own KV, as Triton kernels.

The queries of all heads that share a KV head are one matrix (16 heads x 16 positions at the real size): each page
is read once per tile of 128 of them. A long context is split over programs, each leaving a partial softmax,
which a second launch combines; a short one takes one launch.
"""

# Kernels are Triton's language, not Python: no types but tl.constexpr, whose names are written as constants.
# ruff: noqa: N803
# mypy: disable-error-code="import-not-found, import-untyped, no-untyped-def, untyped-decorator"

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from twotower_kernels.triton.common import as_dtype, interpreted

MAX_BLOCK = 64
"""The most positions a block may have."""

_MIN_DOT = 16
"""The smallest side of a matrix that the tensor cores take."""

_MAX_SPLITS = 64
"""The most splits: the combining launch holds one row of all splits in registers."""

_SPLIT_TOKENS = 512
"""The fewest tokens in a split: a split costs writing and reading its tile of the output in fp32, which a shorter one
would not repay."""


def block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    table: Tensor,
    lengths: Tensor,
    *,
    causal: bool = False,
    max_length: int | None = None,
    splits: int | None = None,
) -> Tensor:
    """As `twotower_kernels.attention.block_attention`, in one launch, or two where the context is split.

    q (B, heads, L, d), k and v (B, kv_heads, L, d), fp32 or bf16, any strides but contiguous in d; k_pages and
    v_pages (pages, kv_heads, page, d) of equal strides, any but a head's page contiguous, page a power of two >= 16;
    table (B, width) int32, lengths (B,) int32. Nothing is read back from the device: the grid follows `max_length`,
    an upper bound of `lengths` known to the caller (by default what the table's width can hold), and lengths at run
    time only end loops. So a CUDA graph serves all contexts up to its bound. `splits` overrides how many programs
    share a context; the order of sums, and so the last bits, depend on it.

    Returns (B, heads, L, d) in q's dtype, laid out as (B, L, heads, d), so that joining the heads is a view.
    """
    batch, heads, length, d = q.shape
    kv_heads, page = k_pages.shape[1:3]
    assert 1 <= length <= MAX_BLOCK
    assert heads % kv_heads == 0
    assert k.shape == v.shape == (batch, kv_heads, length, d)
    assert k_pages.shape == v_pages.shape
    assert k_pages.shape[3] == d
    assert q.dtype in (torch.float32, torch.bfloat16)
    assert q.dtype == k.dtype == v.dtype == k_pages.dtype == v_pages.dtype
    assert q.stride(3) == k.stride(3) == v.stride(3) == 1
    assert k_pages.stride() == v_pages.stride()
    assert k_pages.stride()[2:] == (d, 1)
    assert page >= _MIN_DOT
    assert page & (page - 1) == 0
    assert table.shape[0] == lengths.shape[0] == batch
    assert table.stride(1) == 1
    out = torch.empty(batch, length, heads, d, dtype=q.dtype, device=q.device).transpose(1, 2)
    if batch == 0:
        return out
    ratio = heads // kv_heads
    low = q.dtype is torch.bfloat16
    # In fp32 a tile takes twice the shared memory.
    block_m = min(128 if low else 64, max(_MIN_DOT, triton.next_power_of_2(ratio * length)))
    tiles = triton.cdiv(ratio * length, block_m)
    width = table.shape[1] * page
    longest = width if max_length is None else min(max_length, width)
    if splits is None:
        splits = _choose_splits(tiles * batch * kv_heads, longest, q.device)
    assert 1 <= splits <= _MAX_SPLITS
    partial = sums = maxima = None
    if splits > 1:
        rows = batch * heads * length
        partial = torch.empty(rows, splits, d, dtype=torch.float32, device=q.device)
        maxima, sums = torch.empty(2, rows, splits, dtype=torch.float32, device=q.device).unbind(0)
    block_d = max(_MIN_DOT, triton.next_power_of_2(d))
    _attention_kernel[(tiles, splits, batch * kv_heads)](
        q,
        k,
        v,
        k_pages,
        v_pages,
        table,
        lengths,
        out,
        partial,
        maxima,
        sums,
        math.log2(math.e) / math.sqrt(d),
        length,
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        *out.stride()[:3],
        *k_pages.stride()[:2],
        table.stride(0),
        KV_HEADS=kv_heads,
        RATIO=ratio,
        HEAD_DIM=d,
        PAGE=page,
        SPLITS=splits,
        CAUSAL=causal,
        INTERPRETED=interpreted(),
        BLOCK_M=block_m,
        BLOCK_L=max(_MIN_DOT, triton.next_power_of_2(length)),
        BLOCK_D=block_d,
        num_warps=8 if block_m == 128 else 4,
        num_stages=3 if low else 2,
        enable_fp_fusion=True,
    )
    if splits > 1:
        _combine_kernel[(length, heads, batch)](
            partial,
            maxima,
            sums,
            out,
            *out.stride()[:3],
            HEAD_DIM=d,
            SPLITS=splits,
            INTERPRETED=interpreted(),
            BLOCK_S=triton.next_power_of_2(splits),
            BLOCK_D=block_d,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return out


def _choose_splits(programs: int, longest: int, device: torch.device) -> int:
    """Enough splits for two programs on each multiprocessor, as far as the context is long enough."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132
    return max(1, min(2 * processors // programs, longest // _SPLIT_TOKENS, _MAX_SPLITS))


@triton.jit
def _attend(q, keys, values, seen, acc, top, total, scale):
    """One tile of keys: q (M, D), keys and values (T, D), seen (M, T) or (1, T), at least one True in each row.

    acc (M, D), top (M,) the largest score so far in base 2 and total (M,) are the softmax under way.
    """
    scores = tl.dot(q, tl.trans(keys), input_precision="tf32x3") * scale
    scores = tl.where(seen, scores, -float("inf"))
    new_top = tl.maximum(top, tl.max(scores, 1))
    weights = tl.exp2(scores - new_top[:, None])
    shrink = tl.exp2(top - new_top)
    acc = acc * shrink[:, None] + tl.dot(weights.to(values.dtype), values, input_precision="tf32x3")
    return acc, new_top, total * shrink + tl.sum(weights, 1)


@triton.jit
def _attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    k_pages,
    v_pages,
    table,
    lengths,
    out,
    partial,
    maxima,
    sums,
    scale,
    length,
    q_row,
    q_head,
    q_position,
    k_row,
    k_head,
    k_position,
    v_row,
    v_head,
    v_position,
    out_row,
    out_head,
    out_position,
    page_stride,
    page_head,
    table_row,
    KV_HEADS: tl.constexpr,
    RATIO: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    SPLITS: tl.constexpr,
    CAUSAL: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program: BLOCK_M of the queries of one KV head of one row, over one split of its context.

    Query m is that of head m // L of the group at position m % L. The first split also sees the block itself.
    """
    tile, split = tl.program_id(0), tl.program_id(1)
    row, kv_head = (tl.program_id(2) // KV_HEADS).to(tl.int64), tl.program_id(2) % KV_HEADS
    # The interpreter multiplies bf16 wrongly, so it gets fp32; tensor cores get the stored dtype.
    compute = tl.float32 if INTERPRETED else q_ptr.dtype.element_ty
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    head, position = kv_head * RATIO + m // length, m % length
    d = tl.arange(0, BLOCK_D)
    known = (m < RATIO * length)[:, None] & (d < HEAD_DIM)[None, :]
    q_at = row * q_row + head[:, None] * q_head + position[:, None] * q_position + d[None, :]
    q = tl.load(q_ptr + q_at, mask=known, other=0.0).to(compute)

    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    top = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    if split == 0:
        j = tl.arange(0, BLOCK_L)
        own = (j < length)[:, None] & (d < HEAD_DIM)[None, :]
        k_at = row * k_row + kv_head * k_head + j[:, None] * k_position + d[None, :]
        v_at = row * v_row + kv_head * v_head + j[:, None] * v_position + d[None, :]
        keys = tl.load(k_ptr + k_at, mask=own, other=0.0).to(compute)
        values = tl.load(v_ptr + v_at, mask=own, other=0.0).to(compute)
        seen = (j < length)[None, :]
        if CAUSAL:
            seen = seen & (j[None, :] <= position[:, None])
        acc, top, total = _attend(q, keys, values, seen, acc, top, total, scale)

    context = tl.load(lengths + row)
    pages = tl.cdiv(context, PAGE)
    share = tl.cdiv(pages, SPLITS)
    t = tl.arange(0, PAGE)
    for i in range(split * share, tl.minimum((split + 1) * share, pages)):
        page = tl.load(table + row * table_row + i).to(tl.int64)
        seen = i * PAGE + t < context
        at = page * page_stride + kv_head.to(tl.int64) * page_head + t[:, None] * HEAD_DIM + d[None, :]
        # Beyond the context's end a page may hold anything, even NaN, which a weight of 0 would not cancel.
        inside = seen[:, None] & (d < HEAD_DIM)[None, :]
        keys = tl.load(k_pages + at, mask=inside, other=0.0).to(compute)
        values = tl.load(v_pages + at, mask=inside, other=0.0).to(compute)
        acc, top, total = _attend(q, keys, values, seen[None, :], acc, top, total, scale)

    if SPLITS == 1:
        out_at = row * out_row + head[:, None] * out_head + position[:, None] * out_position + d[None, :]
        result = as_dtype(acc / total[:, None], out.dtype.element_ty, INTERPRETED)
        tl.store(out + out_at, result, mask=known)
    else:
        # In the order of rows (B, heads, L). A split without pages leaves -inf and 0, and no output to be read.
        flat = (((row * KV_HEADS * RATIO + head) * length + position) * SPLITS + split).to(tl.int64)
        queries = m < RATIO * length
        tl.store(maxima + flat, top, mask=queries)
        tl.store(sums + flat, total, mask=queries)
        used = (split == 0) | (split * share < pages)
        if used:
            tl.store(partial + flat[:, None] * HEAD_DIM + d[None, :], acc, mask=known)


@triton.jit
def _combine_kernel(
    partial,
    maxima,
    sums,
    out,
    out_row,
    out_head,
    out_position,
    HEAD_DIM: tl.constexpr,
    SPLITS: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program: one query of one head. The first split is never empty, so that some maximum is finite."""
    position, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    s, d = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_D)
    at = ((row * tl.num_programs(1) + head) * tl.num_programs(0) + position) * SPLITS + s
    top = tl.load(maxima + at, mask=s < SPLITS, other=-float("inf"))
    weight = tl.exp2(top - tl.max(top, 0))
    total = tl.sum(weight * tl.load(sums + at, mask=s < SPLITS, other=0.0), 0)
    used = (s < SPLITS) & (top != -float("inf"))
    acc = tl.load(partial + at[:, None] * HEAD_DIM + d[None, :], mask=used[:, None] & (d < HEAD_DIM)[None, :], other=0.0)
    result = tl.sum(acc * weight[:, None], 0) / total
    out_at = row * out_row + head * out_head + position * out_position + d
    tl.store(out + out_at, as_dtype(result, out.dtype.element_ty, INTERPRETED), mask=d < HEAD_DIM)
