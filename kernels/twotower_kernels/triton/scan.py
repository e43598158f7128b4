"""Mamba-2 over one short block, from in_proj's output to out_proj's input, as Triton kernels.

Three launches: conv, silu and dt over channels (`triton.mix`), the scan with D skip and gate, the norm over each group of
heads. The scan reads S once from memory, and where the block is committed the same programs write the new S: by
`triton.factors.advance` alone, so that the context and its workers agree by construction.

A block has at most 64 positions and is processed 16 at a time: positions within the block contribute by matrix products
over pairs of positions, all earlier ones by one product with the seed. S and all sums are fp32; x, b and c are rounded to
the model's dtype where the torch layer rounds them. In bf16 they are exact operands of the tensor cores' tf32, and the
other factor is split into two parts that are exact, too: about 22 of its bits count. In fp32 the products are plain ones.

Letters in shapes: B batch, L length, h heads, p head_dim, g groups, n state size, K conv kernel,
C = h p + 2 g n channels of the conv.
"""

# Kernels are Triton's language, not Python: no types but tl.constexpr, whose names are written as constants.
# ruff: noqa: N803
# mypy: disable-error-code="import-not-found, import-untyped, no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from twotower_kernels.block import ScanFactors, ScanWeights, empty_factors
from twotower_kernels.triton.common import MIN_DOT, as_dtype, interpreted, silu
from twotower_kernels.triton.factors import UNROLL, advance
from twotower_kernels.triton.mix import Mixed, mix

MAX_BLOCK = 64
"""The most positions a block may have."""

_TILE = 16
"""Positions of a block that are processed at a time."""

_BLOCK_K = 32
"""Columns of a head's state that are multiplied at a time."""

_STAGES = 4
"""How many of these pieces are loaded at once: all of them, at the published size."""


def block_scan(
    projected: Tensor, conv_tail: Tensor, ssm: Tensor, weights: ScanWeights, *, slots: Tensor | None = None
) -> Tensor:
    """A block's output from a seed state, which is read and never changed. The denoiser runs this at every step.

    projected (B, L, h p + C + h): in_proj's output z | xBC | dt, fp32 or bf16, contiguous in its last axis.
    conv_tail (B, C, K) of the same dtype and ssm (B, h, p, n) fp32, contiguous. With `slots` (B,) int64 they
    are pools, (slots, C, K) and (slots, h, p, n), and row i starts from slot slots[i], so that seeds need not
    be gathered first. Returns (B, L, h p) in the dtype of `projected`, normed: out_proj's input.
    """
    if projected.shape[0] == 0:
        return projected.new_empty(*projected.shape[:2], weights.norm.shape[0])
    return _scan(projected, conv_tail, ssm, weights, slots, commit=False)[0]


def block_scan_factors(
    projected: Tensor, conv_tail: Tensor, ssm: Tensor, weights: ScanWeights, *, slots: Tensor | None = None
) -> tuple[Tensor, ScanFactors]:
    """As `block_scan`, and also returns the factors, which take a state past the block, or past its first positions.

    They have the bits of `block_scan_commit`'s, but lack the conv tails (an empty tensor): see `tails_after`.
    """
    out, mixed = _scan(projected, conv_tail, ssm, weights, slots, commit=False)
    return out, mixed.factors


def block_scan_commit(
    projected: Tensor, conv_tail: Tensor, ssm: Tensor, weights: ScanWeights, *, slots: Tensor | None = None
) -> tuple[Tensor, ScanFactors]:
    """As `block_scan`, and takes the state past the block, in place. The context runs this once a block is finished.

    conv_tail and ssm (of the slots, which must be distinct) end with the bits that `apply_factors` gives anywhere from the
    factors. Returns the output and the factors.
    """
    if projected.shape[0] == 0:
        return block_scan(projected, conv_tail, ssm, weights), empty_factors(projected, conv_tail, ssm, weights.groups)
    out, mixed = _scan(projected, conv_tail, ssm, weights, slots, commit=True)
    return out, mixed.factors


def _scan(
    projected: Tensor, conv_tail: Tensor, ssm: Tensor, weights: ScanWeights, slots: Tensor | None, *, commit: bool
) -> tuple[Tensor, Mixed]:
    batch, length, width = projected.shape
    rows, heads, head_dim, n = ssm.shape
    groups = weights.groups
    d_inner = heads * head_dim
    channels = d_inner + 2 * groups * n
    kernel = weights.conv_weight.shape[-1]
    assert batch > 0
    assert 1 <= length <= MAX_BLOCK
    assert width == d_inner + channels + heads
    assert heads % groups == 0
    assert projected.dtype in (torch.float32, torch.bfloat16)
    assert projected.stride(2) == 1
    assert conv_tail.shape == (rows, channels, kernel)
    assert conv_tail.dtype == projected.dtype
    assert ssm.dtype == torch.float32
    assert conv_tail.is_contiguous()
    assert ssm.is_contiguous()
    assert weights.conv_weight.shape == (channels, 1, kernel)
    assert rows == batch if slots is None else slots.shape == (batch,)
    mixed = mix(projected, conv_tail, weights, slots, commit=commit)
    factors = mixed.factors
    gated = torch.empty(batch, length, d_inner, dtype=torch.float32, device=projected.device)
    block_p, warps = program(head_dim)
    block_n = max(MIN_DOT, triton.next_power_of_2(n))
    wide = interpreted()
    _block_scan_kernel[(triton.cdiv(head_dim, block_p), heads, batch)](
        ssm,
        slots,
        factors.x,
        factors.b,
        mixed.c,
        factors.dt,
        mixed.step,
        mixed.step.exp() if commit else None,  # torch's own exp, see `apply_factors`
        weights.d,
        projected,
        gated,
        length,
        projected.stride(0),
        projected.stride(1),
        HEADS=heads,
        HEAD_DIM=head_dim,
        GROUPS=groups,
        STATE=n,
        HAS_SLOTS=slots is not None,
        COMMIT=commit,
        ONE=commit and length == 1,
        TILES=triton.cdiv(length, _TILE),
        TILE=_TILE,
        UNROLL=UNROLL,
        STAGES=_STAGES,
        BLOCK_P=block_p,
        BLOCK_N=block_n,
        BLOCK_K=min(_BLOCK_K, block_n),
        num_warps=warps,
        enable_fp_fusion=False,  # the new state has the bits of separate operations
    )
    out = torch.empty(batch, length, d_inner, dtype=projected.dtype, device=projected.device)
    size = d_inner // groups
    _norm_kernel[(batch * length, groups)](
        gated,
        weights.norm,
        out,
        size,
        weights.eps,
        INTERPRETED=wide,
        BLOCK=triton.next_power_of_2(size),
        num_warps=4,
        enable_fp_fusion=True,
    )
    return out, mixed


def program(head_dim: int) -> tuple[int, int]:
    """The rows of a head's state that a program holds, and its number of warps.

    Small programs are the fastest at every batch from 1 to 32 (H100): a program mostly waits for memory, and with small
    ones more loads are under way at once.
    """
    return max(MIN_DOT, min(16, triton.next_power_of_2(head_dim))), 2


@triton.jit
def _product(exact, other, acc, LOW: tl.constexpr):
    """acc plus exact (M, K) times other (K, N), summed in fp32; LOW: whether `exact` holds bf16 values."""
    if LOW:
        high = (other.to(tl.uint32, bitcast=True) & 0xFFFFE000).to(tl.float32, bitcast=True)
        acc = tl.dot(exact, high, acc, input_precision="tf32")
        acc = tl.dot(exact, other - high, acc, input_precision="tf32")
    else:
        acc = tl.dot(exact, other, acc, input_precision="ieee")
    return acc


@triton.jit
def _product_left(other, exact, acc, LOW: tl.constexpr):
    """As `_product`, the other way round: other (M, K) times exact (K, N)."""
    if LOW:
        high = (other.to(tl.uint32, bitcast=True) & 0xFFFFE000).to(tl.float32, bitcast=True)
        acc = tl.dot(high, exact, acc, input_precision="tf32")
        acc = tl.dot(other - high, exact, acc, input_precision="tf32")
    else:
        acc = tl.dot(other, exact, acc, input_precision="ieee")
    return acc


@triton.jit
def _block_scan_kernel(
    ssm,
    slots,
    x_ptr,
    b_ptr,
    c_ptr,
    dt_ptr,
    step_ptr,
    decay_ptr,
    skip,
    projected,
    gated,
    length,
    row_stride,
    stride,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    GROUPS: tl.constexpr,
    STATE: tl.constexpr,
    HAS_SLOTS: tl.constexpr,
    COMMIT: tl.constexpr,
    ONE: tl.constexpr,
    TILES: tl.constexpr,
    TILE: tl.constexpr,
    UNROLL: tl.constexpr,
    STAGES: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program: BLOCK_P rows of one head's state, in one row of the batch."""
    part, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    d_inner: tl.constexpr = HEADS * HEAD_DIM
    low: tl.constexpr = x_ptr.dtype.element_ty == tl.bfloat16
    group = head // (HEADS // GROUPS)
    slot = row
    if HAS_SLOTS:
        slot = tl.load(slots + row).to(tl.int64)
    p = part * BLOCK_P + tl.arange(0, BLOCK_P)
    n = tl.arange(0, BLOCK_N)
    p_known, n_known = p < HEAD_DIM, n < STATE
    s_known = p_known[:, None] & n_known[None, :]
    s_at = ((slot * HEADS + head) * HEAD_DIM + p[:, None]) * STATE + n[None, :]
    first = row * length
    channel = head * HEAD_DIM + p
    d = tl.load(skip + head)
    if not ONE:
        k = tl.arange(0, TILE * TILES if TILES != 3 else TILE * 4)
        steps = tl.load(step_ptr + (first + k) * HEADS + head, mask=k < length, other=0.0)
        own = tl.arange(0, TILE)
        for tile in tl.static_range(TILES):
            i = tile * TILE + own
            inside = i < length
            of_i = (first + i)[:, None]
            of_c = c_ptr + (of_i * GROUPS + group) * STATE
            # Logs of decays are each summed over their own span: a difference of two sums from the block's start would lose a
            # small one behind a large one.
            step = tl.load(step_ptr + (first + i) * HEADS + head, mask=inside, other=0.0)
            within = tl.cumsum(step, 0)
            before = tl.sum(tl.where(k < tile * TILE, steps, 0.0), 0)
            y = tl.zeros((TILE, BLOCK_P), tl.float32)
            scores = tl.zeros((TILE, TILE), tl.float32)
            of_s = ssm + ((slot * HEADS + head) * HEAD_DIM + p[:, None]) * STATE
            of_b = b_ptr + (of_i * GROUPS + group) * STATE
            for at in tl.range(0, BLOCK_N, BLOCK_K, num_stages=STAGES):
                m = at + tl.arange(0, BLOCK_K)
                there = m < STATE
                s = tl.load(of_s + m[None, :], mask=p_known[:, None] & there[None, :], other=0.0)
                c = tl.load(of_c + m[None, :], mask=inside[:, None] & there[None, :], other=0.0).to(tl.float32)
                b = tl.load(of_b + m[None, :], mask=inside[:, None] & there[None, :], other=0.0).to(tl.float32)
                y = _product(c, tl.trans(s), y, low)
                scores = tl.dot(c, tl.trans(b), scores, input_precision="tf32" if low else "ieee")
            y *= tl.exp(before + within)[:, None]
            # From position j (of column j) to i (of row i).
            later = own[:, None] > own[None, :]
            span = tl.cumsum(tl.where(later, tl.broadcast_to(step[:, None], (TILE, TILE)), 0.0), axis=0)
            decay = tl.where(own[:, None] >= own[None, :], tl.exp(span), 0.0)
            dt = tl.load(dt_ptr + (first + i) * HEADS + head, mask=inside, other=0.0)
            known = inside[:, None] & p_known[None, :]
            x = tl.load(x_ptr + of_i * d_inner + channel[None, :], mask=known, other=0.0).to(tl.float32)
            y = _product_left(scores * decay * dt[None, :], x, y + d * x, low)
            for earlier in tl.static_range(tile):
                j = earlier * TILE + own
                of_j = (first + j)[:, None]
                of_b = b_ptr + (of_j * GROUPS + group) * STATE
                scores = tl.zeros((TILE, TILE), tl.float32)
                for at in tl.range(0, BLOCK_N, BLOCK_K, num_stages=STAGES):
                    m = at + tl.arange(0, BLOCK_K)
                    there = m < STATE
                    c = tl.load(of_c + m[None, :], mask=inside[:, None] & there[None, :], other=0.0).to(tl.float32)
                    b = tl.load(of_b + m[None, :], mask=there[None, :], other=0.0).to(tl.float32)
                    scores = tl.dot(c, tl.trans(b), scores, input_precision="tf32" if low else "ieee")
                between = (k[:, None] > j[None, :]) & (k[:, None] < tile * TILE)
                decay = tl.exp(tl.sum(tl.where(between, steps[:, None], 0.0), 0)[None, :] + within[:, None])
                dt = tl.load(dt_ptr + (first + j) * HEADS + head)
                x = tl.load(x_ptr + of_j * d_inner + channel[None, :], mask=p_known[None, :], other=0.0).to(tl.float32)
                y = _product_left(scores * decay * dt[None, :], x, y, low)
            z_at = projected + row * row_stride + i[:, None] * stride + channel[None, :]
            z = tl.load(z_at, mask=known, other=0.0).to(tl.float32)
            tl.store(gated + of_i * d_inner + channel[None, :], y * silu(z), mask=known)
    if COMMIT:
        new = tl.load(ssm + s_at, mask=s_known, other=0.0, eviction_policy="evict_first")
        new = advance(
            new,
            x_ptr,
            b_ptr,
            dt_ptr,
            decay_ptr,
            row * length,
            length,
            head,
            group,
            p,
            n,
            HEADS,
            HEAD_DIM,
            GROUPS,
            STATE,
            BLOCK_P,
            BLOCK_N,
            UNROLL,
        )
        tl.debug_barrier()  # every thread has read the old one
        tl.store(ssm + s_at, new, mask=s_known)
        if ONE:  # the output follows from the new state
            c_one = tl.load(c_ptr + (first * GROUPS + group) * STATE + n, mask=n_known, other=0.0).to(tl.float32)
            x_one = tl.load(x_ptr + first * d_inner + channel, mask=p_known, other=0.0).to(tl.float32)
            z_one = tl.load(projected + row * row_stride + channel, mask=p_known, other=0.0).to(tl.float32)
            y_one = tl.sum(new * c_one[None, :], 1) + d * x_one
            tl.store(gated + first * d_inner + channel, y_one * silu(z_one), mask=p_known)


@triton.jit
def _norm_kernel(gated, weight, out, size, eps, INTERPRETED: tl.constexpr, BLOCK: tl.constexpr):
    """One program: one group of one position."""
    group, groups = tl.program_id(1), tl.num_programs(1)
    offset = tl.arange(0, BLOCK)
    known = offset < size
    at = (tl.program_id(0).to(tl.int64) * groups + group) * size + offset
    v = tl.load(gated + at, mask=known, other=0.0)
    scale = tl.rsqrt(tl.sum(v * v, axis=0) / size + eps)
    v = v * scale * tl.load(weight + group * size + offset, mask=known, other=0.0)
    tl.store(out + at, as_dtype(v, out.dtype.element_ty, INTERPRETED), mask=known)
