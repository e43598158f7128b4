"""The part of a block before the scan: conv, silu and the time steps, in one launch over channels, as a Triton kernel.

Each channel is computed once, whichever heads read it. A commit's launch also updates the conv tails in place.

Letters in shapes: as in `triton.scan`.
"""

# Kernels are Triton's language, not Python: no types but tl.constexpr, whose names are written as constants.
# ruff: noqa: N803
# mypy: disable-error-code="import-not-found, import-untyped, no-untyped-def, untyped-decorator"

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from twotower_kernels.block import ScanFactors, ScanWeights
from twotower_kernels.triton.common import as_dtype, interpreted, silu


@dataclass(frozen=True, slots=True)
class Mixed:
    """The scan's inputs from its block."""

    factors: ScanFactors
    """Without the conv tails (an empty tensor), unless the block is committed."""
    c: Tensor
    """(B, L, g, n), model dtype."""
    step: Tensor
    """(B, L, h) fp32: dt times the head's rate, the log of its decay."""


def mix(projected: Tensor, conv_tail: Tensor, weights: ScanWeights, slots: Tensor | None, *, commit: bool) -> Mixed:
    """As `twotower_kernels.block.mix`, without z; B >= 1.

    commit: whether the slots' conv tails take the block's last columns, which the factors then hold as well.
    """
    batch, length, _ = projected.shape
    channels, kernel = conv_tail.shape[1:]
    heads, d_inner = weights.a.shape[0], weights.norm.shape[0]
    bc = (channels - d_inner) // 2
    groups, n = weights.groups, bc // weights.groups
    factors = ScanFactors(
        x=projected.new_empty(batch, length, heads, d_inner // heads),
        b=projected.new_empty(batch, length, groups, n),
        dt=torch.empty(batch, length, heads, dtype=torch.float32, device=projected.device),
        conv=conv_tail.new_empty(batch if commit else 0, channels, kernel),
    )
    mixed = Mixed(factors, torch.empty_like(factors.b), torch.empty_like(factors.dt))
    block_l = triton.next_power_of_2(length)
    block_c = min(128 if block_l <= 16 else 64, triton.next_power_of_2(channels))
    parts = triton.cdiv(channels, block_c)
    _mix_kernel[(parts + 1, batch)](
        projected,
        conv_tail,
        slots,
        weights.conv_weight,
        weights.conv_bias,
        weights.dt_bias,
        weights.a,
        factors.x,
        factors.b,
        mixed.c,
        factors.dt,
        mixed.step,
        factors.conv,
        length,
        *weights.time_step_limit,
        projected.stride(0),
        projected.stride(1),
        HEADS=heads,
        D_INNER=d_inner,
        BC=bc,
        KERNEL=kernel,
        PARTS=parts,
        HAS_SLOTS=slots is not None,
        HAS_BIAS=weights.conv_bias is not None,
        COMMIT=commit,
        INTERPRETED=interpreted(),
        BLOCK_L=block_l,
        BLOCK_C=block_c,
        BLOCK_H=triton.next_power_of_2(heads),
        BLOCK_K=triton.next_power_of_2(kernel),
        num_warps=4,
        enable_fp_fusion=True,
    )
    return mixed


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
    the channel) is false or beyond `length`, values are finite and unspecified. Taps are added in the torch function's order.
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
    return as_dtype(silu(total), dtype, INTERPRETED).to(tl.float32)


@triton.jit
def _dt(raw, dt_min, dt_max):
    """softplus and clamp."""
    # log1p(e), exact also where 1 + e rounds: the rounding of u cancels in log(u) / (u - 1).
    e = tl.exp(tl.where(raw > 20.0, 20.0, raw))
    u = 1.0 + e
    small = u == 1.0
    log1p = tl.where(small, e, tl.log(u) * (e / tl.where(small, 1.0, u - 1.0)))
    dt = tl.where(raw > 20.0, raw, log1p)
    # Comparisons keep NaN, which minimum and maximum would turn into a number.
    dt = tl.where(dt < dt_min, dt_min, dt)
    return tl.where(dt > dt_max, dt_max, dt)


@triton.jit
def _mix_kernel(
    projected,
    conv_tail,
    slots,
    conv_weight,
    conv_bias,
    dt_bias,
    rates,
    out_x,
    out_b,
    out_c,
    out_dt,
    out_step,
    out_conv,
    length,
    dt_min,
    dt_max,
    row_stride,
    stride,
    HEADS: tl.constexpr,
    D_INNER: tl.constexpr,
    BC: tl.constexpr,
    KERNEL: tl.constexpr,
    PARTS: tl.constexpr,
    HAS_SLOTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    COMMIT: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program: BLOCK_C channels of one row; a row's last program computes its time steps."""
    part, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    channels: tl.constexpr = D_INNER + 2 * BC
    columns = projected + row * row_stride + D_INNER
    position = tl.arange(0, BLOCK_L)
    at = (row * length + position)[:, None]
    if part == PARTS:
        head = tl.arange(0, BLOCK_H)
        there = (position < length)[:, None] & (head < HEADS)[None, :]
        raw = tl.load(columns + channels + head[None, :] + position[:, None] * stride, mask=there, other=0.0).to(tl.float32)
        raw += tl.load(dt_bias + head, mask=head < HEADS, other=0.0)[None, :]
        dt = _dt(raw, dt_min, dt_max)
        tl.store(out_dt + at * HEADS + head[None, :], dt, mask=there)
        rate = tl.load(rates + head, mask=head < HEADS, other=0.0)
        tl.store(out_step + at * HEADS + head[None, :], dt * rate[None, :], mask=there)
    else:
        seed_row = row
        if HAS_SLOTS:
            seed_row = tl.load(slots + row).to(tl.int64)
        tail = conv_tail + seed_row * channels * KERNEL
        channel = part * BLOCK_C + tl.arange(0, BLOCK_C)
        known = channel < channels
        v = _mixed(
            columns, tail, conv_weight, conv_bias, channel, known, length, stride, KERNEL, HAS_BIAS, INTERPRETED, BLOCK_L
        )
        v = as_dtype(v, projected.dtype.element_ty, INTERPRETED)
        inside = (position < length)[:, None] & known[None, :]
        of_b, of_c = channel - D_INNER, channel - D_INNER - BC
        tl.store(out_x + at * D_INNER + channel[None, :], v, mask=inside & (channel < D_INNER)[None, :])
        tl.store(out_b + at * BC + of_b[None, :], v, mask=inside & ((of_b >= 0) & (of_c < 0))[None, :])
        tl.store(out_c + at * BC + of_c[None, :], v, mask=inside & (of_c >= 0)[None, :])
        if COMMIT:
            # The last K raw columns; after a block shorter than K, some of them are old ones.
            k = tl.arange(0, BLOCK_K)[None, :]
            last = length - KERNEL + k + tl.zeros_like(channel)[:, None]
            kept = known[:, None] & (k < KERNEL)
            old = tl.load(tail + channel[:, None] * KERNEL + (last + KERNEL), mask=kept & (last < 0), other=0.0)
            new = tl.load(columns + last * stride + channel[:, None], mask=kept & (last >= 0), other=0.0)
            new = tl.where(last < 0, old, new)
            tl.store(out_conv + row * channels * KERNEL + channel[:, None] * KERNEL + k, new, mask=kept)
            tl.debug_barrier()  # every thread has read the old ones
            tl.store(tail + channel[:, None] * KERNEL + k, new, mask=kept)
