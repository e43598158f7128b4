"""RMSNorm with adaptive shift and scale, and the gated residual before it, in one launch.

Everything here is bound by memory: one program reads its row once, keeps it in registers in fp32, and writes
once. In torch the same takes some ten launches, each with a round trip of the row.
"""

# Kernels are Triton's language, not Python: no types but tl.constexpr, whose names are written as constants.
# ruff: noqa: N803
# mypy: disable-error-code="import-not-found, import-untyped, no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from twotower_kernels.norms import Order
from twotower_kernels.triton.common import as_dtype, interpreted


def modulated_norm(
    h: Tensor, weight: Tensor, eps: float, shift: Tensor | None = None, scale: Tensor | None = None, *, order: Order
) -> Tensor:
    """As `twotower_kernels.norms.modulated_norm`, in one launch.

    h (B, L, H) fp32 or bf16, weight (H,), shift and scale (B, 1, H) or None; any strides but contiguous in H.
    Returns (B, L, H), contiguous, in h's dtype.
    """
    return _launch(h, None, None, weight, eps, shift, scale, order)[1]


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
    """As `twotower_kernels.norms.add_modulated_norm`, in one launch.

    h and x (B, L, H), gate (B, 1, H) or None; the rest as in `modulated_norm`. Returns both (B, L, H), contiguous,
    in h's dtype.
    """
    return _launch(h, x, gate, weight, eps, shift, scale, order)


def _launch(
    h: Tensor,
    x: Tensor | None,
    gate: Tensor | None,
    weight: Tensor,
    eps: float,
    shift: Tensor | None,
    scale: Tensor | None,
    order: Order,
) -> tuple[Tensor, Tensor]:
    """The residual (h itself without x) and its norm."""
    batch, length, hidden = h.shape
    assert h.dtype in (torch.float32, torch.bfloat16)
    assert weight.shape == (hidden,)
    assert (shift is None) == (scale is None)
    assert x is None or x.shape == h.shape
    for vector in (gate, shift, scale):
        assert vector is None or vector.shape == (batch, 1, hidden)
    for tensor in (h, x, gate, weight, shift, scale):
        assert tensor is None or tensor.stride(-1) == 1 or hidden == 1
    out = torch.empty(batch, length, hidden, dtype=h.dtype, device=h.device)
    added = h if x is None else torch.empty_like(out)
    if out.numel() == 0:
        return added, out
    block = triton.next_power_of_2(hidden)
    _norm_kernel[(length, batch)](
        h,
        x,
        gate,
        weight,
        shift,
        scale,
        added,
        out,
        eps,
        hidden,
        *h.stride()[:2],
        *((0, 0) if x is None else x.stride()[:2]),
        0 if gate is None else gate.stride(0),
        0 if shift is None else shift.stride(0),
        0 if scale is None else scale.stride(0),
        ADD=x is not None,
        GATE=gate is not None,
        MODULATE=shift is not None,
        MODULATE_FIRST=order == "modulate_first",
        INTERPRETED=interpreted(),
        BLOCK=block,
        # Eight bf16 of a row for each thread and load: 16 bytes.
        num_warps=min(8, max(1, block // 256)),
        enable_fp_fusion=True,
    )
    return added, out


@triton.jit
def _norm_kernel(
    h_ptr,
    x_ptr,
    gate_ptr,
    weight_ptr,
    shift_ptr,
    scale_ptr,
    added_ptr,
    out_ptr,
    eps,
    hidden,
    h_row,
    h_position,
    x_row,
    x_position,
    gate_row,
    shift_row,
    scale_row,
    ADD: tl.constexpr,
    GATE: tl.constexpr,
    MODULATE: tl.constexpr,
    MODULATE_FIRST: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: one position of one row, (H,). Lanes beyond H hold 0 and are not counted."""
    position, row = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    i = tl.arange(0, BLOCK)
    known = i < hidden
    at = (row * tl.num_programs(0) + position) * hidden + i
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    h = tl.load(h_ptr + row * h_row + position * h_position + i, mask=known, other=0.0).to(tl.float32)
    if ADD:
        x = tl.load(x_ptr + row * x_row + position * x_position + i, mask=known, other=0.0).to(tl.float32)
        if GATE:
            x = x * tl.load(gate_ptr + row * gate_row + i, mask=known, other=0.0).to(tl.float32)
        added = as_dtype(h + x, dtype, INTERPRETED)
        tl.store(added_ptr + at, added, mask=known)
        h = added.to(tl.float32)
    if MODULATE:
        shift = tl.load(shift_ptr + row * shift_row + i, mask=known, other=0.0).to(tl.float32)
        factor = 1.0 + tl.load(scale_ptr + row * scale_row + i, mask=known, other=0.0).to(tl.float32)
        if MODULATE_FIRST:
            h = h * factor + shift
    weight = tl.load(weight_ptr + i, mask=known, other=0.0).to(tl.float32)
    h = h * (1.0 / tl.sqrt_rn(tl.sum(h * h, 0) / hidden + eps)) * weight
    if MODULATE and not MODULATE_FIRST:
        h = h * factor + shift
    tl.store(out_ptr + at, as_dtype(h, dtype, INTERPRETED), mask=known)
