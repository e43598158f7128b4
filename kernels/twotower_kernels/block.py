"""Mamba-2 over one short block, from in_proj's output to out_proj's input: both towers run it for every block.

Conv, silu, dt, the scan from a seed state, D skip, gate and norm over each group of heads (docs/model.md, Mamba-2 layer).

Letters in shapes: B batch, L length, h heads, p head_dim, g groups, n state size, K conv kernel,
C = h p + 2 g n channels of the conv.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from twotower_kernels.conv import causal_conv
from twotower_kernels.scan import apply_factors, apply_factors_, chunk_scan


@dataclass(frozen=True, slots=True)
class ScanWeights:
    """The weights of a Mamba-2 layer between its projections, contiguous."""

    conv_weight: Tensor
    """(C, 1, K), any float dtype."""
    conv_bias: Tensor | None
    """(C,)."""
    dt_bias: Tensor
    """(h,) fp32."""
    a: Tensor
    """(h,) fp32, negative: -exp(A_log)."""
    d: Tensor
    """(h,) fp32."""
    norm: Tensor
    """(h p,) fp32."""
    groups: int
    """g, the groups of b and c, and of the norm."""
    eps: float
    """The norm's epsilon."""
    time_step_limit: tuple[float, float]
    """dt is clamped to this range after softplus; the upper limit may be infinite."""


@dataclass(frozen=True, slots=True)
class ScanFactors:
    """What a commit changes in one layer, per row, in the form that `apply_factors_` takes."""

    x: Tensor
    """(B, L, h, p), model dtype."""
    b: Tensor
    """(B, L, g, n), model dtype."""
    dt: Tensor
    """(B, L, h) fp32, after softplus and clamp."""
    conv: Tensor
    """(B, C, K): the new tail of raw xBC columns, newest last, model dtype."""


def block_scan(
    projected: Tensor, conv_tail: Tensor, ssm: Tensor, weights: ScanWeights, *, slots: Tensor | None = None
) -> Tensor:
    """A block's output from a seed state, which is read and never changed. The denoiser runs this at every step.

    projected (B, L, h p + C + h): in_proj's output z | xBC | dt, contiguous in its last axis. conv_tail (B, C, K) of the same
    dtype and ssm (B, h, p, n) fp32, contiguous. With `slots` (B,) int64 they are pools, (slots, C, K) and
    (slots, h, p, n), and row i starts from slot slots[i], so that seeds need not be gathered first.
    Returns (B, L, h p) in the dtype of `projected`, normed: out_proj's input.
    """
    if slots is not None:
        conv_tail, ssm = conv_tail.index_select(0, slots), ssm.index_select(0, slots)
    z, f, c = mix(projected, conv_tail, weights)
    y, _, _ = chunk_scan(f.x, f.dt, weights.a, f.b, c, ssm, f.x.shape[1], need_states=False)
    return finish(y, f.x, z, weights)


def block_scan_factors(
    projected: Tensor, conv_tail: Tensor, ssm: Tensor, weights: ScanWeights, *, slots: Tensor | None = None
) -> tuple[Tensor, ScanFactors]:
    """As `block_scan_commit`, with the same bits, but without changing the state.

    Later, `apply_factors_` with `counts` can take the state past the block's first positions; `tails_after` then gives
    the tail. Returns the output and the factors; GPU forms omit the conv tails (an empty tensor).
    """
    if slots is not None:
        conv_tail, ssm = conv_tail.index_select(0, slots), ssm.index_select(0, slots)
    z, f, c = mix(projected, conv_tail, weights)
    factors = ScanFactors(f.x.contiguous(), f.b.contiguous(), f.dt.contiguous(), f.conv.contiguous())
    if projected.shape[1] == 1:
        y = _read_off(apply_factors(ssm, factors.x, factors.b, factors.dt, weights.a), c, weights)
    else:
        y, _, _ = chunk_scan(f.x, f.dt, weights.a, f.b, c, ssm, f.x.shape[1], need_states=False)
    return finish(y, f.x, z, weights), factors


def block_scan_commit(
    projected: Tensor, conv_tail: Tensor, ssm: Tensor, weights: ScanWeights, *, slots: Tensor | None = None
) -> tuple[Tensor, ScanFactors]:
    """As `block_scan`, and takes the state past the block. The context runs this once a block is finished.

    conv_tail and ssm (of the slots, which must be distinct) are changed in place: S by `apply_factors_`, and so to the
    same bits that a worker gets from the same factors. Returns the output and the factors, contiguous.
    """
    tail, seed = (conv_tail, ssm) if slots is None else (conv_tail.index_select(0, slots), ssm.index_select(0, slots))
    z, f, c = mix(projected, tail, weights)
    factors = ScanFactors(f.x.contiguous(), f.b.contiguous(), f.dt.contiguous(), f.conv.contiguous())
    if projected.shape[1] == 1:  # with one position, the output follows from the new state
        take(conv_tail, ssm, factors, weights.a, slots)
        seed = ssm if slots is None else ssm.index_select(0, slots)
        return finish(_read_off(seed, c, weights), f.x, z, weights), factors
    y, _, _ = chunk_scan(f.x, f.dt, weights.a, f.b, c, seed, f.x.shape[1], need_states=False)
    take(conv_tail, ssm, factors, weights.a, slots)  # must come last: `seed` may be the memory that this changes
    return finish(y, f.x, z, weights), factors


def _read_off(ssm: Tensor, c: Tensor, weights: ScanWeights) -> Tensor:
    """The output y (B, 1, h, p) at the one position whose state is ssm (B, h, p, n); c (B, 1, g, n)."""
    return (ssm @ c[:, 0].float().repeat_interleave(ssm.shape[1] // weights.groups, 1).unsqueeze(-1)).squeeze(-1).unsqueeze(1)


def tails_after(conv_tail: Tensor, columns: Tensor, counts: Tensor) -> Tensor:
    """The conv tails after the first counts[i] positions of a block.

    conv_tail (B, C, K): before it; columns (B, L, C): the block's raw xBC; counts (B,) int64, each 0 to L. Returns (B, C, K).
    """
    kernel = conv_tail.shape[-1]
    at = counts.unsqueeze(1) + torch.arange(kernel, device=counts.device)  # among the tail's K columns and the block's L
    known = torch.cat([conv_tail.transpose(1, 2), columns], 1)
    return known.gather(1, at.unsqueeze(-1).expand(-1, -1, known.shape[2])).transpose(1, 2).contiguous()


def take(conv_tail: Tensor, ssm: Tensor, factors: ScanFactors, a: Tensor, slots: Tensor | None = None) -> None:
    """Apply a block's factors to states, in place. Shapes as in `block_scan_commit`; a (h,)."""
    apply_factors_(ssm, factors.x, factors.b, factors.dt, a, slots=slots)
    if slots is None:
        conv_tail.copy_(factors.conv)
    else:
        conv_tail.index_copy_(0, slots, factors.conv)


def mix(projected: Tensor, conv_tail: Tensor, weights: ScanWeights) -> tuple[Tensor, ScanFactors, Tensor]:
    """The part before the scan, over any length: returns z (B, L, h p), the factors (views), c (B, L, g, n). Differentiable."""
    heads, channels, kernel = weights.a.shape[0], weights.conv_weight.shape[0], weights.conv_weight.shape[-1]
    d_inner = weights.norm.shape[0]
    groups, bc_size = weights.groups, (channels - d_inner) // 2
    z, xbc, dt = projected.split([d_inner, channels, heads], dim=-1)
    columns = torch.cat([conv_tail.to(xbc.dtype).transpose(1, 2), xbc], dim=1)  # (B, K + L, C)
    mixed = F.silu(causal_conv(columns[:, 1:], weights.conv_weight, weights.conv_bias))
    x, b, c = mixed.split([d_inner, bc_size, bc_size], dim=-1)
    factors = ScanFactors(
        x=x.unflatten(-1, (heads, -1)),
        b=b.unflatten(-1, (groups, -1)),
        dt=F.softplus(dt.float() + weights.dt_bias).clamp(*weights.time_step_limit),
        conv=columns[:, -kernel:].transpose(1, 2),
    )
    return z, factors, c.unflatten(-1, (groups, -1))


def finish(y: Tensor, x: Tensor, z: Tensor, weights: ScanWeights) -> Tensor:
    """The part after the scan: ``rmsnorm_groups((y + D x) * silu(z)) * weight``, in fp32. Differentiable.

    y (B, L, h, p) fp32, x alike, z (B, L, h p) -> (B, L, h p) in z's dtype.
    """
    y = y + weights.d.float().unsqueeze(-1) * x.float()
    gated = (y.flatten(-2).float() * F.silu(z.float())).unflatten(-1, (weights.groups, -1))
    normed = F.rms_norm(gated, gated.shape[-1:], None, weights.eps).flatten(-2)
    return (normed * weights.norm).to(z.dtype)


def empty_factors(projected: Tensor, conv_tail: Tensor, ssm: Tensor, groups: int) -> ScanFactors:
    """Allocate the factors of a block; shapes as in `block_scan`."""
    batch, length, _ = projected.shape
    _, heads, head_dim, n = ssm.shape
    return ScanFactors(
        x=projected.new_empty(batch, length, heads, head_dim),
        b=projected.new_empty(batch, length, groups, n),
        dt=torch.empty(batch, length, heads, dtype=torch.float32, device=projected.device),
        conv=conv_tail.new_empty(batch, *conv_tail.shape[1:]),
    )
