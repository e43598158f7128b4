"""Chunks of several prompts in one forward, as Triton kernels: conv and scan, and attention over pages.

Every launch serves all prompts: programs find their chunk by numbers on the device (`Segments`), and none is idle.
A program's results depend on nothing but its own chunk.

The scan goes through a chunk in pieces of 64 positions and keeps S in registers from the seed to the end: positions within a
piece contribute by matrix products over pairs of positions, as in `twotower_kernels.triton.scan`, earlier ones by one with S.

Letters in shapes: as in `twotower_kernels.prefill`; T pieces of at most 64 positions in all.
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

from twotower_kernels.block import ScanWeights
from twotower_kernels.prefill import Segments
from twotower_kernels.triton.attention import _attend
from twotower_kernels.triton.common import MIN_DOT, as_dtype, interpreted, silu
from twotower_kernels.triton.mix import _dt
from twotower_kernels.triton.scan import _norm_kernel

PIECE = 64
"""Positions that a program processes at a time: all pairs of them are held in registers."""

_CHANNELS = 64
"""Channels of the conv that a program computes."""


def prefill_scan(
    projected: Tensor,
    segments: Segments,
    conv_tail: Tensor,
    ssm: Tensor,
    weights: ScanWeights,
    *,
    chunk: int,
    slots: Tensor | None = None,
) -> Tensor:
    """As `twotower_kernels.prefill.prefill_scan`, in three launches; `chunk` has no effect: pieces have `PIECE` positions.

    projected (N, h p + C + h), fp32 or bf16, contiguous in its last axis. conv_tail (B, C, K) of the same dtype and ssm
    (B, h, p, n) fp32, contiguous, or pools with `slots` (B,) int64, distinct. Returns (N, h p).
    """
    total, width = projected.shape
    rows, heads, head_dim, n = ssm.shape
    groups, d_inner = weights.groups, heads * head_dim
    channels, kernel = d_inner + 2 * groups * n, weights.conv_weight.shape[-1]
    batch, device = len(segments), projected.device
    assert total == segments.total
    assert width == d_inner + channels + heads
    assert projected.dtype in (torch.float32, torch.bfloat16)
    assert projected.stride(1) == 1
    assert conv_tail.shape == (rows, channels, kernel)
    assert conv_tail.dtype == projected.dtype
    assert ssm.dtype == torch.float32
    assert conv_tail.is_contiguous()
    assert ssm.is_contiguous()
    assert weights.conv_weight.shape == (channels, 1, kernel)
    assert rows == batch if slots is None else slots.shape == (batch,)
    mixed = torch.empty(total, channels, dtype=projected.dtype, device=device)
    dt = torch.empty(total, heads, dtype=torch.float32, device=device)
    tails = torch.empty(batch, channels, kernel, dtype=conv_tail.dtype, device=device)
    tiles = segments.tiles(PIECE)
    columns = projected[:, d_inner:]
    _prompt_mix_kernel[(triton.cdiv(channels, _CHANNELS), tiles.shape[0])](
        columns,
        conv_tail,
        slots,
        segments.borders,
        tiles,
        weights.conv_weight,
        weights.conv_bias,
        weights.dt_bias,
        mixed,
        dt,
        tails,
        *weights.time_step_limit,
        projected.stride(0),
        channels,
        heads,
        KERNEL=kernel,
        HAS_SLOTS=slots is not None,
        HAS_BIAS=weights.conv_bias is not None,
        INTERPRETED=interpreted(),
        BLOCK_L=PIECE,
        BLOCK_C=_CHANNELS,
        BLOCK_H=triton.next_power_of_2(heads),
        num_warps=4,
        enable_fp_fusion=True,
    )
    gated = torch.empty(total, d_inner, dtype=torch.float32, device=device)
    # A single prompt has fewer heads than the GPU has processors: then several programs share a head.
    block_p = triton.next_power_of_2(head_dim)
    while block_p > MIN_DOT and batch * heads * triton.cdiv(head_dim, block_p) < 256:
        block_p //= 2
    _prompt_scan_kernel[(triton.cdiv(head_dim, block_p), heads, batch)](
        projected,
        mixed,
        dt,
        ssm,
        slots,
        segments.borders,
        weights.a,
        weights.d,
        gated,
        projected.stride(0),
        HEADS=heads,
        HEAD_DIM=head_dim,
        GROUPS=groups,
        STATE=n,
        HAS_SLOTS=slots is not None,
        BLOCK_L=PIECE,
        BLOCK_P=max(MIN_DOT, block_p),
        BLOCK_N=max(MIN_DOT, triton.next_power_of_2(n)),
        num_warps=8,
        enable_fp_fusion=True,
    )
    if slots is None:
        conv_tail.copy_(tails)
    else:
        conv_tail.index_copy_(0, slots, tails)
    out = torch.empty(total, d_inner, dtype=projected.dtype, device=device)
    size = d_inner // groups
    _norm_kernel[(total, groups)](
        gated,
        weights.norm,
        out,
        size,
        weights.eps,
        INTERPRETED=interpreted(),
        BLOCK=triton.next_power_of_2(size),
        num_warps=4,
        enable_fp_fusion=True,
    )
    return out


def prompt_attention(q: Tensor, k_pages: Tensor, v_pages: Tensor, table: Tensor, lengths: Tensor, segments: Segments) -> Tensor:
    """As `twotower_kernels.prefill.prompt_attention`, in one launch.

    q (heads, N, d), fp32 or bf16, contiguous in d; k_pages and v_pages (pages, kv_heads, page, d) of equal strides, any but
    a head's page contiguous, page a power of two >= 16; table (B, width) int32, lengths (B,) int32. Nothing is
    read back from the device. Returns (heads, N, d), laid out as (N, heads, d), so that joining the heads is a view.
    """
    heads, total, d = q.shape
    kv_heads, page = k_pages.shape[1:3]
    assert total == segments.total
    assert heads % kv_heads == 0
    assert k_pages.shape == v_pages.shape
    assert k_pages.shape[3] == d
    assert q.dtype in (torch.float32, torch.bfloat16)
    assert q.dtype == k_pages.dtype == v_pages.dtype
    assert q.stride(2) == 1
    assert k_pages.stride() == v_pages.stride()
    assert k_pages.stride()[2:] == (d, 1)
    assert page >= MIN_DOT
    assert page & (page - 1) == 0
    assert table.shape[0] == lengths.shape[0] == len(segments)
    assert table.stride(1) == 1
    out = torch.empty(total, heads, d, dtype=q.dtype, device=q.device).transpose(0, 1)
    tiles = segments.tiles(PIECE)
    _prompt_attention_kernel[(heads, tiles.shape[0])](
        q,
        k_pages,
        v_pages,
        table,
        lengths,
        segments.borders,
        tiles,
        out,
        math.log2(math.e) / math.sqrt(d),
        *q.stride()[:2],
        *out.stride()[:2],
        *k_pages.stride()[:2],
        table.stride(0),
        RATIO=heads // kv_heads,
        HEAD_DIM=d,
        PAGE=page,
        INTERPRETED=interpreted(),
        BLOCK_L=PIECE,
        BLOCK_D=max(MIN_DOT, triton.next_power_of_2(d)),
        num_warps=4,
        num_stages=3 if q.dtype is torch.bfloat16 else 2,
        enable_fp_fusion=True,
    )
    return out


@triton.jit
def _prompt_mix_kernel(
    columns,
    conv_tail,
    slots,
    borders,
    tiles,
    weight,
    bias,
    dt_bias,
    mixed,
    out_dt,
    tails,
    dt_min,
    dt_max,
    stride,
    channels,
    heads,
    KERNEL: tl.constexpr,
    HAS_SLOTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """One program: conv and silu of some channels of one piece; the first of a piece also its dt; of a chunk's last, its tail.

    `columns` points at xBC, after which dt lies. Other programs still read the old tails, so the new ones go to `tails`.
    """
    row = tl.load(tiles + 2 * tl.program_id(1)).to(tl.int64)
    first = tl.load(tiles + 2 * tl.program_id(1) + 1)
    start = tl.load(borders + row)
    length = (tl.load(borders + row + 1) - start).to(tl.int32)
    seed_row = row
    if HAS_SLOTS:
        seed_row = tl.load(slots + row).to(tl.int64)
    tail = conv_tail + seed_row * channels * KERNEL
    chunk = columns + start * stride
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    known = channel < channels
    dtype = columns.dtype.element_ty
    position = first + tl.arange(0, BLOCK_L)
    inside = position < length

    total = tl.zeros((BLOCK_L, BLOCK_C), tl.float32)
    for k in tl.static_range(KERNEL):
        at = (position + (k - KERNEL + 1))[:, None]
        here = inside[:, None] & known[None, :]
        new = tl.load(chunk + at * stride + channel[None, :], mask=here & (at >= 0), other=0.0).to(tl.float32)
        if k < KERNEL - 1:
            old = tl.load(tail + channel[None, :] * KERNEL + (at + KERNEL), mask=here & (at < 0), other=0.0)
            new = tl.where(at < 0, old.to(tl.float32), new)
        tap = tl.load(weight + channel * KERNEL + k, mask=known, other=0.0).to(tl.float32)
        total = tl.fma(new, tl.broadcast_to(tap[None, :], new.shape), total)
    if HAS_BIAS:
        total += tl.load(bias + channel, mask=known, other=0.0).to(tl.float32)[None, :]
    total = as_dtype(total, dtype, INTERPRETED).to(tl.float32)
    to = (start + position)[:, None] * channels + channel[None, :]
    tl.store(mixed + to, as_dtype(silu(total), dtype, INTERPRETED), mask=inside[:, None] & known[None, :])

    if first + BLOCK_L >= length:
        for k in tl.static_range(KERNEL):
            column = length - KERNEL + k + tl.zeros_like(channel)  # the interpreter takes a scalar condition for a number
            before = tl.load(tail + channel * KERNEL + (column + KERNEL), mask=known & (column < 0), other=0.0)
            own = tl.load(chunk + column * stride + channel, mask=known & (column >= 0), other=0.0)
            tl.store(tails + (row * channels + channel) * KERNEL + k, tl.where(column < 0, before, own), mask=known)

    if tl.program_id(0) == 0:
        head = tl.arange(0, BLOCK_H)
        both = inside[:, None] & (head < heads)[None, :]
        dt = tl.load(chunk + position[:, None] * stride + channels + head[None, :], mask=both, other=0.0).to(tl.float32)
        dt += tl.load(dt_bias + head, mask=head < heads, other=0.0)[None, :]
        tl.store(out_dt + (start + position)[:, None] * heads + head[None, :], _dt(dt, dt_min, dt_max), mask=both)


@triton.jit
def _prompt_scan_kernel(
    projected,
    mixed,
    dts,
    ssm,
    slots,
    borders,
    rates,
    skip,
    gated,
    stride,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    GROUPS: tl.constexpr,
    STATE: tl.constexpr,
    HAS_SLOTS: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program: BLOCK_P rows of one head's state, through one whole chunk, in place."""
    part, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    d_inner: tl.constexpr = HEADS * HEAD_DIM
    channels: tl.constexpr = d_inner + 2 * GROUPS * STATE
    group = head // (HEADS // GROUPS)
    exact: tl.constexpr = "tf32" if mixed.dtype.element_ty == tl.bfloat16 else "tf32x3"  # values of bf16 are exact in tf32
    start = tl.load(borders + row)
    length = (tl.load(borders + row + 1) - start).to(tl.int32)
    slot = row
    if HAS_SLOTS:
        slot = tl.load(slots + row).to(tl.int64)
    p = part * BLOCK_P + tl.arange(0, BLOCK_P)
    n = tl.arange(0, BLOCK_N)
    p_known, n_known = p < HEAD_DIM, n < STATE
    x_channel = head * HEAD_DIM + p
    b_channel = d_inner + group * STATE + n
    state_at = ssm + ((slot * HEADS + head) * HEAD_DIM + p[:, None]) * STATE + n[None, :]
    state_known = p_known[:, None] & n_known[None, :]
    state = tl.load(state_at, mask=state_known, other=0.0)
    rate, through = tl.load(rates + head), tl.load(skip + head)
    place = tl.arange(0, BLOCK_L)
    before = place[:, None] > place[None, :]

    for first in range(0, length, BLOCK_L):
        inside = first + place < length
        at = start + first + place
        rows = mixed + at[:, None] * channels
        b_known = inside[:, None] & n_known[None, :]
        known = inside[:, None] & p_known[None, :]
        x = tl.load(rows + x_channel[None, :], mask=known, other=0.0).to(tl.float32)
        b = tl.load(rows + b_channel[None, :], mask=b_known, other=0.0).to(tl.float32)
        c = tl.load(rows + b_channel[None, :] + GROUPS * STATE, mask=b_known, other=0.0).to(tl.float32)
        dt = tl.load(dts + at * HEADS + head, mask=inside, other=0.0)
        # Logs of the decays between positions j < i, each summed over its own span: a difference of two sums from the
        # piece's start would lose a small one behind a large one.
        step = dt * rate
        steps = tl.where(before, tl.broadcast_to(step[:, None], (BLOCK_L, BLOCK_L)), 0.0)
        decay = tl.where(place[:, None] >= place[None, :], tl.exp(tl.cumsum(steps, axis=0)), 0.0)
        from_start = tl.exp(tl.cumsum(step, axis=0))
        to_end = tl.exp(tl.sum(steps, axis=0))
        dtx = x * dt[:, None]
        scores = tl.dot(c, tl.trans(b), input_precision=exact) * decay
        y = tl.dot(c, tl.trans(state), input_precision="tf32x3") * from_start[:, None]
        y += tl.dot(scores, dtx, input_precision="tf32x3")
        y += through * x
        z = tl.load(projected + at[:, None] * stride + x_channel[None, :], mask=known, other=0.0).to(tl.float32)
        tl.store(gated + at[:, None] * d_inner + x_channel[None, :], y * silu(z), mask=known)
        added = tl.dot(tl.trans(dtx * to_end[:, None]), b, input_precision="tf32x3")
        state = state * tl.exp(tl.sum(step, axis=0)) + added
    tl.store(state_at, state, mask=state_known)


@triton.jit
def _prompt_attention_kernel(
    q_ptr,
    k_pages,
    v_pages,
    table,
    lengths,
    borders,
    tiles,
    out,
    scale,
    q_head,
    q_position,
    out_head,
    out_position,
    page_stride,
    page_head,
    table_row,
    RATIO: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program: one query head of one piece, over its session's pages up to the piece's last position.

    The query heads of a KV head follow one another, so that the pages one has read are still in the cache for the next.
    """
    head, tile = tl.program_id(0), tl.program_id(1)
    # The interpreter multiplies bf16 wrongly, so it gets fp32; tensor cores get the stored dtype.
    compute = tl.float32 if INTERPRETED else q_ptr.dtype.element_ty
    row = tl.load(tiles + 2 * tile).to(tl.int64)
    first = tl.load(tiles + 2 * tile + 1)
    start = tl.load(borders + row)
    length = (tl.load(borders + row + 1) - start).to(tl.int32)
    context = tl.load(lengths + row)
    position = first + tl.arange(0, BLOCK_L)
    at = start + position
    d = tl.arange(0, BLOCK_D)
    known = (position < length)[:, None] & (d < HEAD_DIM)[None, :]
    q = tl.load(q_ptr + head.to(tl.int64) * q_head + at[:, None] * q_position + d[None, :], mask=known, other=0.0).to(compute)

    acc = tl.zeros((BLOCK_L, BLOCK_D), tl.float32)
    top = tl.full((BLOCK_L,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_L,), tl.float32)
    end = context + tl.minimum(first + BLOCK_L, length)
    kv_head = (head // RATIO).to(tl.int64)
    t = tl.arange(0, PAGE)
    for i in range(0, tl.cdiv(end, PAGE)):
        page = tl.load(table + row * table_row + i).to(tl.int64)
        key = i * PAGE + t
        # Beyond the end a page may hold anything, even NaN, which a weight of 0 would not cancel.
        written = (key < end)[:, None] & (d < HEAD_DIM)[None, :]
        from_page = page * page_stride + kv_head * page_head + t[:, None] * HEAD_DIM + d[None, :]
        keys = tl.load(k_pages + from_page, mask=written, other=0.0).to(compute)
        values = tl.load(v_pages + from_page, mask=written, other=0.0).to(compute)
        # All rows see the first page's first key, so that no row's maximum stays infinite.
        seen = key[None, :] <= context + position[:, None]
        acc, top, total = _attend(q, keys, values, seen, acc, top, total, scale)
    result = as_dtype(acc / total[:, None], out.dtype.element_ty, INTERPRETED)
    tl.store(out + head.to(tl.int64) * out_head + at[:, None] * out_position + d[None, :], result, mask=known)
