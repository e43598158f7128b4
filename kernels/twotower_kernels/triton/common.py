"""Helpers of several kernels: rounding to the model's dtype, and whether Triton's interpreter runs them."""

# Kernels are Triton's language, not Python: no types but tl.constexpr, whose names are written as constants.
# ruff: noqa: N803
# mypy: disable-error-code="import-not-found, import-untyped, no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

MIN_DOT = 16
"""The smallest side of a matrix that the tensor cores take."""


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU: its bf16 needs care (`as_dtype`)."""
    return not isinstance(as_dtype, triton.JITFunction)


@triton.jit
def as_dtype(v, DTYPE: tl.constexpr, INTERPRETED: tl.constexpr):
    """Round fp32 to nearest even in DTYPE (fp32 or bf16).

    The interpreter's own cast to bf16 truncates, so there the value is rounded on its bits first,
    which leaves nothing for the cast to do.
    """
    if INTERPRETED and DTYPE == tl.bfloat16:  # noqa: SIM300, DTYPE only looks like a constant
        bits = v.to(tl.uint32, bitcast=True)
        # Add half of the last kept place, less one where that place is even; NaN would overflow, so it is left as it is.
        nearest = (bits + (0x7FFF + ((bits >> 16) & 1)).to(tl.uint32)) & 0xFFFF0000
        v = tl.where(v == v, nearest.to(tl.uint32).to(tl.float32, bitcast=True), v)
    return v.to(DTYPE)


@triton.jit
def silu(v):
    """v sigmoid(v), without an exp that overflows."""
    e = tl.exp(-tl.abs(v))
    return v * tl.where(v < 0, e, 1.0) / (1.0 + e)
