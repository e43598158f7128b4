"""The routed experts of a MoE layer as grouped products over all experts at once, as Triton kernels.

Four launches: a plan (which rows each expert has), up with relu2, down with the routing weight, and the sum over
a token's choices. A program of a product owns some output columns of one expert and walks over that expert's rows,
so that an expert without rows costs an empty program and, at the few rows of decoding, each weight that is needed
is read once. Weights are the left operand and tokens the right one: the tensor cores take 64 or more of the left
and as few as 16 of the right, which fits decoding.

No sum is atomic: each (token, choice) has a row of its own until the last launch adds them in order of choice.
The order of the sums within a row does not depend on what else is in the batch.

Letters in shapes: N tokens, k choices, R = N k rows, E experts, H hidden size, I width of an expert.
"""

# Kernels are Triton's language, not Python: no types but tl.constexpr, whose names are written as constants.
# ruff: noqa: N803
# mypy: disable-error-code="import-not-found, import-untyped, no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from twotower_kernels.triton.common import as_dtype, interpreted

_MIN_DOT = 16
"""The smallest side of a matrix that the tensor cores take."""

_MAX_ROWS = 128
"""Rows of one expert that a program holds at once; it walks over more."""


def grouped_experts(
    hidden: Tensor, experts: Tensor, weights: Tensor, up: Tensor, down: Tensor, *, block_rows: int | None = None
) -> Tensor:
    """As `twotower_kernels.experts.grouped_experts`: sum over a token's experts of weight * down(relu2(up(x))).

    hidden (N, H) fp32 or bf16, contiguous in H, experts (N, k) int64 in [0, E), weights (N, k) fp32, up (E, I, H) and
    down (E, H, I) contiguous, of hidden's dtype. Products are summed in fp32; what lies between the two projections
    is rounded to hidden's dtype, after relu2 only. Nothing is read back from the device, and the grids depend on shapes
    alone, so that a CUDA graph serves any routing. `block_rows`, a power of two >= 16, overrides how many rows a
    program holds at once; results do not depend on it but through the order in which a tensor core adds.

    Returns (N, H) fp32.
    """
    n, top_k = experts.shape
    total, width, size = up.shape
    assert hidden.shape == (n, size)
    assert weights.shape == (n, top_k)
    assert down.shape == (total, size, width)
    assert hidden.dtype in (torch.float32, torch.bfloat16)
    assert hidden.dtype == up.dtype == down.dtype
    assert experts.dtype == torch.int64
    assert weights.dtype == torch.float32
    assert hidden.stride(1) == 1
    assert up.is_contiguous()
    assert down.is_contiguous()
    if n == 0:
        return torch.empty(n, size, dtype=torch.float32, device=hidden.device)
    if block_rows is None:
        block_rows = choose_rows(n, n * top_k, total)
    assert block_rows >= _MIN_DOT
    starts, order = plan(experts, total)
    mid = torch.empty(n * top_k, width, dtype=hidden.dtype, device=hidden.device)
    _project(hidden, up, mid, starts, order, None, top_k, block_rows)
    parts = torch.empty(n * top_k, size, dtype=torch.float32, device=hidden.device)
    _project(mid, down, parts, starts, order, weights.contiguous(), top_k, block_rows)
    return sum_choices(parts, top_k)


def plan(experts: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """Which rows each of `total` experts has: experts (N, k) int64 -> their starts (total + 1,) and their order (N k,)."""
    rows = experts.numel()
    starts = torch.empty(total + 1, dtype=torch.int32, device=experts.device)
    order = torch.empty(rows, dtype=torch.int32, device=experts.device)
    _plan_kernel[(total,)](
        experts.contiguous(),
        starts,
        order,
        rows,
        BLOCK=min(1024, triton.next_power_of_2(rows)),
        num_warps=4,
        enable_fp_fusion=True,
    )
    return starts, order


def sum_choices(parts: Tensor, top_k: int) -> Tensor:
    """parts (N k, H) fp32, weighted, in the order of (token, choice) -> (N, H) fp32."""
    rows, size = parts.shape
    n = rows // top_k
    out = torch.empty(n, size, dtype=torch.float32, device=parts.device)
    block = min(1024, triton.next_power_of_2(size))
    _sum_kernel[(triton.cdiv(size, block), n)](parts, out, size, TOP_K=top_k, BLOCK=block, num_warps=4, enable_fp_fusion=True)
    return out


def choose_rows(n: int, rows: int, experts: int) -> int:
    """Twice an expert's average rows, so that few experts need a second walk; no expert has more rows than all tokens."""
    fair = triton.next_power_of_2(triton.cdiv(2 * rows, experts))
    return int(max(_MIN_DOT, min(fair, triton.next_power_of_2(n), _MAX_ROWS)))


def _project(
    x: Tensor,
    matrices: Tensor,
    out: Tensor,
    starts: Tensor,
    order: Tensor,
    weights: Tensor | None,
    top_k: int,
    block_rows: int,
) -> None:
    """One projection of all experts: up from tokens to rows in expert order, or, with weights, down and back.

    matrices (E, O, C): O outputs of C inputs. Up: x (N, C), out (R, O) in expert order. Down: x (R, C) in expert
    order, out (R, O) in the order of (token, choice).
    """
    total, outputs, inputs = matrices.shape
    low = x.dtype is torch.bfloat16
    # A stage is 16 KiB of weights in bf16: 3 or more under way in each of 2 programs a multiprocessor keep the memory
    # busy. In fp32 the same number of elements takes twice the shared memory.
    block_inputs = min(128 if low else 32, max(_MIN_DOT, triton.next_power_of_2(inputs)))
    block_outputs = 64 if block_rows < _MAX_ROWS else 128
    _project_kernel[(triton.cdiv(outputs, block_outputs), total)](
        x,
        matrices,
        out,
        starts,
        order,
        weights,
        outputs,
        inputs,
        x.stride(0),
        TOP_K=top_k,
        UP=weights is None,
        INTERPRETED=interpreted(),
        BLOCK_ROWS=block_rows,
        BLOCK_OUT=block_outputs,
        BLOCK_IN=block_inputs if block_rows < _MAX_ROWS else min(64, block_inputs),
        num_warps=4 if block_rows < _MAX_ROWS else 8,
        num_stages=4 if low and block_rows != 64 else 3,  # with 64, a fourth would leave room for one program only
        enable_fp_fusion=True,
    )


@triton.jit
def _plan_kernel(experts, starts, order, rows, BLOCK: tl.constexpr):
    """One program: one expert e. Writes starts[e], the number of rows of the experts before it, and places its own rows.

    order (R,): the rows by expert, and within an expert in their original order, as from a stable sort.
    """
    e = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    before = tl.zeros((BLOCK,), tl.int32)
    for at in range(0, rows, BLOCK):
        chosen = tl.load(experts + at + i, mask=at + i < rows, other=1 << 30).to(tl.int32)
        before += (chosen < e).to(tl.int32)
    start = tl.sum(before, 0)
    tl.store(starts + e, start)
    for at in range(0, rows, BLOCK):
        own = (tl.load(experts + at + i, mask=at + i < rows, other=1 << 30).to(tl.int32) == e).to(tl.int32)
        tl.store(order + start + tl.cumsum(own, 0) - 1, at + i, mask=own != 0)
        start += tl.sum(own, 0)
    if e == tl.num_programs(0) - 1:
        tl.store(starts + e + 1, start)


@triton.jit
def _project_kernel(
    x,
    matrices,
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
    # Lanes beyond the last output read the last one again: valid memory, and never stored.
    matrix = matrices + (expert.to(tl.int64) * outputs + tl.minimum(o, outputs - 1))[:, None] * inputs + c[None, :]
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
        store_rows(acc, out, weights, row, first + r, known, o, outputs, UP, INTERPRETED)


@triton.jit
def store_rows(acc, out, weights, row, at, known, o, outputs, UP: tl.constexpr, INTERPRETED: tl.constexpr):
    """acc (outputs o, rows): after relu2 to the rows `at` of expert order, or weighted to `row` of (token, choice)."""
    stored = (o < outputs)[:, None] & known[None, :]
    if UP:
        acc = tl.where(acc < 0, 0.0, acc)  # a maximum with 0 would make 0 of NaN
        result = as_dtype(acc * acc, out.dtype.element_ty, INTERPRETED)
        tl.store(out + at.to(tl.int64)[None, :] * outputs + o[:, None], result, mask=stored)
    else:
        acc = acc * tl.load(weights + row, mask=known, other=0.0)[None, :]
        tl.store(out + row.to(tl.int64)[None, :] * outputs + o[:, None], acc, mask=stored)


@triton.jit
def _sum_kernel(parts, out, size, TOP_K: tl.constexpr, BLOCK: tl.constexpr):
    """One program: BLOCK outputs of one token, its choices added in their order."""
    token = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.load(parts + token * TOP_K * size + i, mask=i < size, other=0.0)
    for choice in tl.static_range(1, TOP_K):
        total += tl.load(parts + (token * TOP_K + choice) * size + i, mask=i < size, other=0.0)
    tl.store(out + token * size + i, total, mask=i < size)
