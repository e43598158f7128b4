"""The routed experts with weights in 8 or 4 bits (`twotower_kernels.quant`), as Triton kernels.

The launches and their order are those of `triton.experts`; only the products differ: weights stream in at 1 or
about 0.56 bytes each and are widened in registers. Decoding is bound by reading weights, so a step saves as much.

A widened weight is exact in bf16 before its power-of-two scale is applied, and that scale is applied to the fp32 sum:
the products are those of `dequantize`, to the bit. In fp4 the two values of a byte are the left operands of two
products, one with the even inputs, one with the odd: nothing is interleaved in registers.

Letters in shapes: as in `triton.experts`.
"""

# Kernels are Triton's language, not Python: no types but tl.constexpr, whose names are written as constants.
# ruff: noqa: N803
# mypy: disable-error-code="import-not-found, import-untyped, no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from twotower_kernels.quant import GROUP, Packed
from twotower_kernels.triton.common import interpreted
from twotower_kernels.triton.experts import choose_rows, plan, store_rows, sum_choices

_WIDE = 128
"""The rows of a program from which on its time goes into products rather than into reading weights."""


def supported(device: torch.device) -> bool:
    """Whether these kernels run on `device`: E4M3 needs compute capability 8.9 (Ada, Hopper) or later, or the interpreter."""
    return interpreted() if device.type == "cpu" else torch.cuda.get_device_capability(device) >= (8, 9)


def quantized_experts(
    hidden: Tensor, experts: Tensor, weights: Tensor, up: Packed, down: Packed, *, block_rows: int | None = None
) -> Tensor:
    """As `twotower_kernels.quant.quantized_experts`, without unpacking anything in memory, and without a sync.

    hidden (N, H) fp32 or bf16, contiguous in H, experts (N, k) int64 in [0, E), weights (N, k) fp32, up (E, I, H) and
    down (E, H, I), contiguous, of one format. Rounding, sums and `block_rows` are those of `triton.experts`.

    Returns (N, H) fp32.
    """
    n, top_k = experts.shape
    total, width, size = up.values.shape[0], up.outputs, up.inputs
    assert hidden.shape == (n, size)
    assert weights.shape == (n, top_k)
    assert (down.outputs, down.inputs) == (size, width)
    assert up.format == down.format
    assert hidden.dtype in (torch.float32, torch.bfloat16)
    assert experts.dtype == torch.int64
    assert weights.dtype == torch.float32
    assert hidden.stride(1) == 1
    assert all(tensor.is_contiguous() for tensor in (*up.tensors, *down.tensors))
    if n == 0:
        return torch.empty(n, size, dtype=torch.float32, device=hidden.device)
    if block_rows is None:
        block_rows = choose_rows(n, n * top_k, total)
    starts, order = plan(experts, total)
    mid = torch.empty(n * top_k, width, dtype=hidden.dtype, device=hidden.device)
    _project(hidden, up, mid, starts, order, None, top_k, block_rows)
    parts = torch.empty(n * top_k, size, dtype=torch.float32, device=hidden.device)
    _project(mid, down, parts, starts, order, weights.contiguous(), top_k, block_rows)
    return sum_choices(parts, top_k)


def _project(
    x: Tensor,
    matrices: Packed,
    out: Tensor,
    starts: Tensor,
    order: Tensor,
    weights: Tensor | None,
    top_k: int,
    block_rows: int,
) -> None:
    """One projection of all experts; arguments as in `triton.experts`."""
    low, wide = x.dtype is torch.bfloat16, block_rows >= _WIDE
    outputs, inputs = matrices.outputs, matrices.inputs
    block_outputs = 128 if wide else 64
    # A stage is 8 KiB of weights; fp32 tokens, which tests alone use, take twice the shared memory.
    most = (64 if wide else 128) if matrices.format == "fp8" else (128 if wide else 256)
    grid = (triton.cdiv(outputs, block_outputs), starts.numel() - 1)
    common = (out, starts, order, weights, outputs, inputs, x.stride(0))
    meta = {
        "TOP_K": top_k,
        "UP": weights is None,
        "INTERPRETED": interpreted(),
        "BLOCK_ROWS": block_rows,
        "BLOCK_OUT": block_outputs,
        "BLOCK_IN": min(most if low else most // 4, max(2 * GROUP, triton.next_power_of_2(inputs))),
        "num_warps": 8 if wide else 4,
        "num_stages": 4 if low else 3,
        "enable_fp_fusion": True,
    }
    if matrices.matrix_scale is None:
        _fp8_kernel[grid](x, matrices.values, matrices.scales, *common, **meta)
    else:
        _fp4_kernel[grid](x, matrices.values, matrices.scales, matrices.matrix_scale, *common, **meta)


@triton.jit
def _fp8_kernel(
    x,
    values,
    scales,
    out,
    starts,
    order,
    weights,
    outputs,
    inputs,
    x_row,
    TOP_K: tl.constexpr,
    UP: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    """One program: BLOCK_OUT outputs of one expert for all of its rows, BLOCK_ROWS of them at a time."""
    # The interpreter multiplies bf16 wrongly, so it gets fp32; tensor cores get the stored dtype.
    compute = tl.float32 if INTERPRETED else x.dtype.element_ty
    expert = tl.program_id(1)
    start, end = tl.load(starts + expert), tl.load(starts + expert + 1)
    o = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    c = tl.arange(0, BLOCK_IN)
    r = tl.arange(0, BLOCK_ROWS)
    # Outputs behind the last read the last one again: a row of valid memory, never stored.
    matrix_row = expert.to(tl.int64) * outputs + tl.minimum(o, outputs - 1)
    matrix = values + matrix_row[:, None] * inputs + c[None, :]
    scale = tl.load(scales + matrix_row)
    for first in range(start, end, BLOCK_ROWS):
        known = first + r < end
        row = tl.load(order + first + r, mask=known, other=0)
        source = row // TOP_K if UP else first + r
        tokens = x + source.to(tl.int64)[None, :] * x_row + c[:, None]
        acc = tl.zeros((BLOCK_OUT, BLOCK_ROWS), tl.float32)
        for at in range(0, inputs, BLOCK_IN):
            w = tl.load(matrix + at, mask=(at + c < inputs)[None, :], other=0.0).to(compute)
            t = tl.load(tokens + at, mask=(at + c < inputs)[:, None] & known[None, :], other=0.0).to(compute)
            acc = tl.dot(w, t, acc, input_precision="tf32x3")
        store_rows(acc * scale[:, None], out, weights, row, first + r, known, o, outputs, UP, INTERPRETED)


@triton.jit
def _e2m1(code):
    """E2M1 of the low 4 bits, times 2^-14: its exponent put where fp16 has the lowest bits of its own. Exact."""
    code = code.to(tl.uint16)
    return (((code & 7) << 9) | ((code & 8) << 12)).to(tl.float16, bitcast=True)


@triton.jit
def _fp4_kernel(
    x,
    values,
    scales,
    matrix_scale,
    out,
    starts,
    order,
    weights,
    outputs,
    inputs,
    x_row,
    TOP_K: tl.constexpr,
    UP: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    """As `_fp8_kernel`. Weights are tiles (outputs, groups, 8 bytes of a group)."""
    compute = tl.float32 if INTERPRETED else x.dtype.element_ty
    expert = tl.program_id(1)
    start, end = tl.load(starts + expert), tl.load(starts + expert + 1)
    o = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    g = tl.arange(0, BLOCK_IN // 16)
    byte = tl.arange(0, 8)
    c = 2 * tl.arange(0, BLOCK_IN // 2)
    r = tl.arange(0, BLOCK_ROWS)
    groups = (inputs + 15) // 16
    matrix_row = expert.to(tl.int64) * outputs + tl.minimum(o, outputs - 1)
    factors = scales + matrix_row[:, None, None] * groups + g[None, :, None]
    matrix = values + matrix_row[:, None, None] * groups * 8 + g[None, :, None] * 8 + byte[None, None, :]
    scale = tl.load(matrix_scale + expert) * 16384  # what _e2m1 leaves out
    for first in range(start, end, BLOCK_ROWS):
        known = first + r < end
        row = tl.load(order + first + r, mask=known, other=0)
        source = row // TOP_K if UP else first + r
        tokens = x + source.to(tl.int64)[None, :] * x_row + c[:, None]
        acc = tl.zeros((BLOCK_OUT, BLOCK_ROWS), tl.float32)
        for at in range(0, inputs, BLOCK_IN):
            there = (at // 16 + g < groups)[None, :, None]
            pair = tl.load(matrix + at // 2, mask=there, other=0)
            # value x scale is a multiple of 2^-24 of at most 6 significant bits below 1: exact in fp16, and so in bf16.
            factor = tl.load(factors + at // 16, mask=there, other=0.0).to(tl.float16)
            low = tl.reshape(_e2m1(pair) * factor, (BLOCK_OUT, BLOCK_IN // 2)).to(compute)
            high = tl.reshape(_e2m1(pair >> 4) * factor, (BLOCK_OUT, BLOCK_IN // 2)).to(compute)
            even = tl.load(tokens + at, mask=(at + c < inputs)[:, None] & known[None, :], other=0.0).to(compute)
            odd = tl.load(tokens + at + 1, mask=(at + c + 1 < inputs)[:, None] & known[None, :], other=0.0).to(compute)
            acc = tl.dot(low, even, acc, input_precision="tf32x3")
            acc = tl.dot(high, odd, acc, input_precision="tf32x3")
        store_rows(acc * scale, out, weights, row, first + r, known, o, outputs, UP, INTERPRETED)
