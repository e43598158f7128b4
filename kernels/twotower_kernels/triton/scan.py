"""Mamba-2 over one short block, and a commit's delta applied to the state, as Triton kernels.

`block_scan` is everything between in_proj and out_proj in two launches: conv, silu, dt, scan, D skip and gate
in the first, the norm over each group of heads in the second. `apply_factors` gives the same bits as
`twotower_kernels.scan.apply_factors`, and a commit's new state comes from it alone, so that the context and its
workers agree by construction.

A block is one chunk (<= 64 positions), held whole by each program: within it, products of matrices over pairs of
positions; from before it, one product with the seed. S and all sums are fp32; x, b and c are rounded to the
model's dtype where the torch layer rounds them.

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

from twotower_kernels.block import ScanFactors, ScanWeights

MAX_BLOCK = 64
"""Positions a block may have: all pairs of positions are held in registers."""

_MIN_DOT = 16
"""The smallest side of a matrix that the tensor cores take."""


def block_scan(
    projected: Tensor, conv_tail: Tensor, ssm: Tensor, weights: ScanWeights, *, slots: Tensor | None = None
) -> Tensor:
    """A block's output from a seed, which is read and never changed: what the denoiser does at every step.

    projected (B, L, h p + C + h): in_proj's output z | xBC | dt, fp32 or bf16, contiguous in its last axis.
    conv_tail (B, C, K) of the same dtype and ssm (B, h, p, n) fp32, contiguous. With `slots` (B,) int64 they
    are pools, (slots, C, K) and (slots, h, p, n), and row i starts from slot slots[i]: seeds need not be copied
    together. Returns (B, L, h p) in the dtype of `projected`, normed: out_proj's input.
    """
    return _scan(projected, conv_tail, ssm, weights, slots, None)


def block_scan_factors(
    projected: Tensor, conv_tail: Tensor, ssm: Tensor, weights: ScanWeights, *, slots: Tensor | None = None
) -> tuple[Tensor, ScanFactors]:
    """As `block_scan`, and returns the factors too, by which a state moves past the block, or past its first positions."""
    batch, length, _ = projected.shape
    _, heads, head_dim, n = ssm.shape
    factors = ScanFactors(
        x=projected.new_empty(batch, length, heads, head_dim),
        b=projected.new_empty(batch, length, weights.groups, n),
        dt=torch.empty(batch, length, heads, dtype=torch.float32, device=projected.device),
        conv=torch.empty((batch, *conv_tail.shape[1:]), dtype=conv_tail.dtype, device=projected.device),
    )
    return _scan(projected, conv_tail, ssm, weights, slots, factors), factors


def block_scan_commit(
    projected: Tensor, conv_tail: Tensor, ssm: Tensor, weights: ScanWeights, *, slots: Tensor | None = None
) -> tuple[Tensor, ScanFactors]:
    """As `block_scan`, and takes the state past the block, in place: what the context does once a block is finished.

    conv_tail and ssm (of the slots, which must be distinct) end with the bits that `apply_factors` gives anywhere from the
    factors. Returns the output and the factors.
    """
    out, factors = block_scan_factors(projected, conv_tail, ssm, weights, slots=slots)
    apply_factors(ssm, factors.x, factors.b, factors.dt, weights.a, slots=slots, out=None if slots is not None else ssm)
    if slots is None:
        conv_tail.copy_(factors.conv)
    else:
        conv_tail.index_copy_(0, slots, factors.conv)
    return out, factors


def apply_factors(
    state: Tensor,
    x: Tensor,
    b: Tensor,
    dt: Tensor,
    a: Tensor,
    *,
    slots: Tensor | None = None,
    counts: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """The state after L positions, from the factors of their updates: the bits of the torch function of that name.

    Either state (h, p, n) fp32, x (L, h, p), b (L, g, n), dt (L, h) fp32, or all of them with a batch axis in
    front; a (h,) fp32. Returns the new state: in `out` if given, which may be `state` itself, else a new tensor.
    With `slots` (B,) int64, distinct, `state` is a pool (slots, h, p, n) whose rows at slots change in place.
    With `counts` (B,) int64, each 0 to L, only the first counts[i] positions of row i are taken.

    What makes the bits equal: per position, torch rounds S * decay (`mul_`), and then adds dtx * b with one
    rounding, a fused multiply-add (`addcmul_` with value 1: std::fma on CUDA, vector FMA on a CPU that has it).
    So does the kernel: an explicit fma, whose addend the compiler cannot fuse a second time; dt * x is rounded on its own.
    Each of these is fixed by IEEE 754 and thus the same on every device. exp is not: the decays are therefore
    torch's own exp, outside of the kernel, since Triton's is another (ex2.approx on CUDA). Two CUDA ends agree,
    with this kernel or the torch function, as long as their torch builds share one expf; a CPU and a CUDA end
    can differ in a decay's last bit, whichever of the two functions they call. Denormals are kept everywhere.
    """
    batched = state.dim() == 4
    if not batched:
        assert slots is None
        assert counts is None
        new = apply_factors(state[None], x[None], b[None], dt[None], a, out=None if out is None else out[None])
        return new[0]
    batch, length, heads, head_dim = x.shape
    groups, n = b.shape[-2:]
    assert state.shape[1:] == (heads, head_dim, n)
    assert b.shape[:2] == (batch, length)
    assert dt.shape == (batch, length, heads)
    assert a.shape == (heads,)
    assert state.dtype == dt.dtype == a.dtype == torch.float32
    assert state.is_contiguous()
    assert counts is None or counts.shape == (batch,)
    if slots is not None:
        assert out is None
        assert slots.shape == (batch,)
        out = state
    else:
        assert state.shape[0] == batch
        out = torch.empty_like(state) if out is None else out
        assert out.shape == state.shape
        assert out.is_contiguous()
    if batch == 0:
        return out
    decay = (dt * a).exp()
    block_n = triton.next_power_of_2(n)
    block_p = min(triton.next_power_of_2(head_dim), max(1, 2048 // block_n))
    _apply_kernel[(triton.cdiv(head_dim, block_p), heads, batch)](
        state,
        out,
        slots,
        counts,
        x.contiguous(),
        b.contiguous(),
        dt.contiguous(),
        decay.contiguous(),
        length,
        heads,
        head_dim,
        groups,
        n,
        HAS_SLOTS=slots is not None,
        HAS_COUNTS=counts is not None,
        BLOCK_P=block_p,
        BLOCK_N=block_n,
        num_warps=4,
        enable_fp_fusion=False,
    )
    return out


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU: its bf16 needs care (`as_dtype`)."""
    return not isinstance(_norm_kernel, triton.JITFunction)


def _scan(
    projected: Tensor, conv_tail: Tensor, ssm: Tensor, weights: ScanWeights, slots: Tensor | None, factors: ScanFactors | None
) -> Tensor:
    batch, length, width = projected.shape
    rows, heads, head_dim, n = ssm.shape
    groups = weights.groups
    d_inner = heads * head_dim
    channels = d_inner + 2 * groups * n
    kernel = weights.conv_weight.shape[-1]
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
    out = torch.empty(batch, length, d_inner, dtype=projected.dtype, device=projected.device)
    if batch == 0:
        return out
    gated = torch.empty(batch, length, d_inner, dtype=torch.float32, device=projected.device)
    block_l = max(_MIN_DOT, triton.next_power_of_2(length))
    # A single session has fewer heads than the GPU has processors: then two programs share a head.
    block_p = triton.next_power_of_2(head_dim)
    if batch * heads < 128:
        block_p //= 2
    block_p = max(_MIN_DOT, block_p)
    wide = interpreted()
    _block_scan_kernel[(triton.cdiv(head_dim, block_p), heads, batch)](
        projected,
        conv_tail,
        ssm,
        slots,
        weights.conv_weight,
        weights.conv_bias,
        weights.dt_bias,
        weights.a,
        weights.d,
        gated,
        None if factors is None else factors.x,
        None if factors is None else factors.b,
        None if factors is None else factors.dt,
        None if factors is None else factors.conv,
        length,
        *weights.time_step_limit,
        projected.stride(0),
        projected.stride(1),
        HEADS=heads,
        HEAD_DIM=head_dim,
        GROUPS=groups,
        STATE=n,
        KERNEL=kernel,
        HAS_SLOTS=slots is not None,
        HAS_BIAS=weights.conv_bias is not None,
        WRITE_FACTORS=factors is not None,
        INTERPRETED=wide,
        BLOCK_L=block_l,
        BLOCK_P=block_p,
        BLOCK_N=max(_MIN_DOT, triton.next_power_of_2(n)),
        num_warps=4 if block_l <= 32 else 8,
        enable_fp_fusion=True,
    )
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
    return out


@triton.jit
def as_dtype(v, DTYPE: tl.constexpr, INTERPRETED: tl.constexpr):
    """Round fp32 to nearest even in DTYPE (fp32 or bf16).

    The interpreter's own cast to bf16 cuts off instead, so there the value is rounded on its bits first,
    which leaves nothing for the cast to do.
    """
    if INTERPRETED and DTYPE == tl.bfloat16:  # noqa: SIM300, DTYPE only looks like a constant
        bits = v.to(tl.uint32, bitcast=True)
        # Half of the last kept place, less one where that place is even; NaN would overflow, and stays.
        nearest = (bits + (0x7FFF + ((bits >> 16) & 1)).to(tl.uint32)) & 0xFFFF0000
        v = tl.where(v == v, nearest.to(tl.uint32).to(tl.float32, bitcast=True), v)
    return v.to(DTYPE)


@triton.jit
def _silu(v):
    """v sigmoid(v), without an exp that overflows."""
    e = tl.exp(-tl.abs(v))
    return v * tl.where(v < 0, e, 1.0) / (1.0 + e)


@triton.jit
def _mixed(
    columns,
    tail,
    weight,
    bias,
    channel,
    known,
    length,
    stride,
    KERNEL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """Conv and silu of some channels at all positions: (BLOCK_L, channels) fp32, holding values of the model's dtype.

    `columns` points at a row's xBC, a position every `stride`; `tail` at the K columns before. Where `known` (of
    the channel) is false or beyond `length`, anything finite. Taps are added in the order of the torch function.
    """
    dtype = columns.dtype.element_ty
    position = tl.arange(0, BLOCK_L)[:, None]
    inside = (position < length) & known[None, :]
    total = tl.zeros((BLOCK_L, channel.shape[0]), tl.float32)
    for k in tl.static_range(KERNEL):
        at = position + (k - KERNEL + 1)
        new = tl.load(columns + at * stride + channel[None, :], mask=inside & (at >= 0), other=0.0).to(tl.float32)
        if k < KERNEL - 1:
            old = tl.load(tail + channel[None, :] * KERNEL + (at + KERNEL), mask=inside & (at < 0), other=0.0)
            new = tl.where(at < 0, old.to(tl.float32), new)
        tap = tl.load(weight + channel * KERNEL + k, mask=known, other=0.0).to(tl.float32)
        total = tl.fma(new, tl.broadcast_to(tap[None, :], new.shape), total)
    if HAS_BIAS:
        total += tl.load(bias + channel, mask=known, other=0.0).to(tl.float32)[None, :]
    total = as_dtype(total, dtype, INTERPRETED).to(tl.float32)
    return as_dtype(_silu(total), dtype, INTERPRETED).to(tl.float32)


@triton.jit
def _write_tail(columns, tail, out, channel, known, length, stride, KERNEL: tl.constexpr):
    """The last K raw columns of some channels, of which a short block leaves some of the old."""
    for k in tl.static_range(KERNEL):
        at = length - KERNEL + k + tl.zeros_like(channel)  # the interpreter mistakes a scalar condition for a number
        old = tl.load(tail + channel * KERNEL + (at + KERNEL), mask=known & (at < 0), other=0.0)
        new = tl.load(columns + at * stride + channel, mask=known & (at >= 0), other=0.0)
        tl.store(out + channel * KERNEL + k, tl.where(at < 0, old, new), mask=known)


@triton.jit
def _block_scan_kernel(
    projected,
    conv_tail,
    ssm,
    slots,
    conv_weight,
    conv_bias,
    dt_bias,
    rates,
    skip,
    gated,
    out_x,
    out_b,
    out_dt,
    out_conv,
    length,
    dt_min,
    dt_max,
    row_stride,
    stride,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    GROUPS: tl.constexpr,
    STATE: tl.constexpr,
    KERNEL: tl.constexpr,
    HAS_SLOTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WRITE_FACTORS: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program: BLOCK_P rows of one head's state, in one row of the batch.

    b and c are the same for the heads of a group and computed by each of them: 8 times a few thousand
    multiplications, against a launch and a round trip through memory.
    """
    part, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    d_inner: tl.constexpr = HEADS * HEAD_DIM
    channels: tl.constexpr = d_inner + 2 * GROUPS * STATE
    per_group: tl.constexpr = HEADS // GROUPS
    group = head // per_group
    dtype = projected.dtype.element_ty
    seed_row = row
    if HAS_SLOTS:
        seed_row = tl.load(slots + row).to(tl.int64)
    z_row = projected + row * row_stride
    columns = z_row + d_inner
    tail = conv_tail + seed_row * channels * KERNEL

    position = tl.arange(0, BLOCK_L)
    inside = position < length
    p = part * BLOCK_P + tl.arange(0, BLOCK_P)
    p_known = p < HEAD_DIM
    n = tl.arange(0, BLOCK_N)
    n_known = n < STATE
    x_channel = head * HEAD_DIM + p
    b_channel = d_inner + group * STATE + n
    c_channel = b_channel + GROUPS * STATE
    x = _mixed(
        columns, tail, conv_weight, conv_bias, x_channel, p_known, length, stride, KERNEL, HAS_BIAS, INTERPRETED, BLOCK_L
    )
    b = _mixed(
        columns, tail, conv_weight, conv_bias, b_channel, n_known, length, stride, KERNEL, HAS_BIAS, INTERPRETED, BLOCK_L
    )
    c = _mixed(
        columns, tail, conv_weight, conv_bias, c_channel, n_known, length, stride, KERNEL, HAS_BIAS, INTERPRETED, BLOCK_L
    )

    dt = tl.load(columns + channels + head + position * stride, mask=inside, other=0.0).to(tl.float32)
    dt += tl.load(dt_bias + head)
    # log1p(e), exact also where 1 + e rounds: the rounding of u cancels in log(u) / (u - 1).
    e = tl.exp(tl.where(dt > 20.0, 20.0, dt))
    u = 1.0 + e
    small = u == 1.0
    log1p = tl.where(small, e, tl.log(u) * (e / tl.where(small, 1.0, u - 1.0)))
    dt = tl.where(dt > 20.0, dt, log1p)
    # Comparisons, since minimum and maximum would make a number of NaN.
    dt = tl.where(dt < dt_min, dt_min, dt)
    dt = tl.where(dt > dt_max, dt_max, dt)
    dt = tl.where(inside, dt, 0.0)

    if WRITE_FACTORS:
        at = row * length + position
        tl.store(
            out_x + at[:, None] * d_inner + x_channel[None, :],
            as_dtype(x, dtype, INTERPRETED),
            mask=inside[:, None] & p_known[None, :],
        )
        tail_out = out_conv + row * channels * KERNEL
        _write_tail(columns, tail, tail_out, x_channel, p_known, length, stride, KERNEL)
        if part == 0:
            tl.store(out_dt + at * HEADS + head, dt, mask=inside)
            if head % per_group == 0:
                tl.store(
                    out_b + at[:, None] * (GROUPS * STATE) + group * STATE + n[None, :],
                    as_dtype(b, dtype, INTERPRETED),
                    mask=inside[:, None] & n_known[None, :],
                )
                _write_tail(columns, tail, tail_out, b_channel, n_known, length, stride, KERNEL)
                _write_tail(columns, tail, tail_out, c_channel, n_known, length, stride, KERNEL)

    # Logs of the decays between positions j < i, each summed over its own span: a difference of two sums from the
    # block's start would lose a small one behind a large one.
    step = dt * tl.load(rates + head)
    later = position[:, None] > position[None, :]
    between = tl.cumsum(tl.where(later, tl.broadcast_to(step[:, None], (BLOCK_L, BLOCK_L)), 0.0), axis=0)
    decay = tl.where(position[:, None] >= position[None, :], tl.exp(between), 0.0)
    from_start = tl.exp(tl.cumsum(step, axis=0))
    seed = tl.load(
        ssm + ((seed_row * HEADS + head) * HEAD_DIM + p[:, None]) * STATE + n[None, :],
        mask=p_known[:, None] & n_known[None, :],
        other=0.0,
    )
    # tf32x3, three products for one, has fp32's precision on tensor cores; values of bf16 are exact in tf32 itself.
    scores = tl.dot(c, tl.trans(b), input_precision="tf32" if dtype == tl.bfloat16 else "tf32x3") * decay
    y = tl.dot(c, tl.trans(seed), input_precision="tf32x3") * from_start[:, None]
    y += tl.dot(scores, x * dt[:, None], input_precision="tf32x3")
    y += tl.load(skip + head) * x
    known = inside[:, None] & p_known[None, :]
    z = tl.load(z_row + position[:, None] * stride + x_channel[None, :], mask=known, other=0.0).to(tl.float32)
    tl.store(gated + (row * length + position[:, None]) * d_inner + x_channel[None, :], y * _silu(z), mask=known)


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


@triton.jit
def _apply_kernel(
    state,
    out,
    slots,
    counts,
    x,
    b,
    dt,
    decay,
    length,
    heads,
    head_dim,
    groups,
    size,
    HAS_SLOTS: tl.constexpr,
    HAS_COUNTS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program: BLOCK_P rows of one head's state, in registers over all positions. Read before it is written."""
    part, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    group = head // (heads // groups)
    slot = row
    if HAS_SLOTS:
        slot = tl.load(slots + row).to(tl.int64)
    p = part * BLOCK_P + tl.arange(0, BLOCK_P)
    n = tl.arange(0, BLOCK_N)
    p_known, n_known = p < head_dim, n < size
    known = p_known[:, None] & n_known[None, :]
    offset = ((slot * heads + head) * head_dim + p[:, None]) * size + n[None, :]
    s = tl.load(state + offset, mask=known, other=0.0)
    last = length
    if HAS_COUNTS:
        last = tl.load(counts + row).to(tl.int32)
    for i in tl.range(0, last, loop_unroll_factor=4):  # so that loads of later positions do not wait for the state
        at = row * length + i
        per_head = at * heads + head
        dtx = tl.load(dt + per_head) * tl.load(x + per_head * head_dim + p, mask=p_known, other=0.0).to(tl.float32)
        row_b = tl.load(b + (at * groups + group) * size + n, mask=n_known, other=0.0).to(tl.float32)
        s = s * tl.load(decay + per_head)
        s = tl.fma(tl.broadcast_to(dtx[:, None], (BLOCK_P, BLOCK_N)), tl.broadcast_to(row_b[None, :], (BLOCK_P, BLOCK_N)), s)
    tl.store(out + offset, s, mask=known)
