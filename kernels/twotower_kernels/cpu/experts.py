"""The routed experts of a MoE layer on a CPU, reading each needed weight once (`products.cpp`)."""

from __future__ import annotations

import torch
from torch import Tensor

from twotower_kernels import experts as plain
from twotower_kernels.cpu.build import MIN_OUTPUTS, check, load


def run_experts(
    hidden: Tensor, experts: Tensor, weights: Tensor, up: Tensor, down: Tensor, wide: Tensor | None = None
) -> Tensor:
    """As `twotower_kernels.experts.run_experts`."""
    differentiable = torch.is_grad_enabled() and (up.requires_grad or hidden.requires_grad)
    if differentiable or not usable(hidden, up, down) or (torch.compiler.is_compiling() and _compiles_better(hidden, wide)):
        return plain.run_experts(hidden, experts, weights, up, down, wide)
    return grouped_experts(hidden, experts, weights, up, down)


def _compiles_better(hidden: Tensor, wide: Tensor | None) -> bool:
    """Whether torch's own products, which the compiler can fuse, make the faster graph."""
    return hidden.shape[0] == 1 or (wide is not None and hidden.shape[0] <= plain.DENSE_ROWS)


def usable(hidden: Tensor, up: Tensor, down: Tensor) -> bool:
    """Whether `grouped_experts` can run on this CPU with these tensors."""
    return (
        hidden.device.type == "cpu"
        and min(up.shape[1:]) >= MIN_OUTPUTS
        and hidden.dtype == up.dtype == down.dtype == torch.bfloat16
        and up.is_contiguous()
        and down.is_contiguous()
        and _available()
    )


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # of torch, which does not type it
def _available() -> bool:
    return load() is not None


def grouped_experts(hidden: Tensor, experts: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """As `twotower_kernels.experts.grouped_experts`; see `usable`.

    Sums are fp32 in a fixed order: a token's result has the same bits whatever else is in the batch.
    The activations between the two projections are rounded to bf16 after relu2. Returns (N, H) fp32.
    """
    return (
        _op(hidden, experts, weights, up, down) if torch.compiler.is_compiling() else _run(hidden, experts, weights, up, down)
    )


def _run(hidden: Tensor, experts: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> Tensor:
    library = load()
    assert library is not None
    n, top_k = experts.shape
    total, width, size = up.shape
    assert hidden.shape == (n, size)
    assert down.shape == (total, size, width)
    assert experts.dtype == torch.int64
    assert weights.dtype == torch.float32
    if hidden.stride(-1) != 1:
        hidden = hidden.contiguous()
    experts, weights = experts.contiguous(), weights.contiguous()
    out = torch.empty(n, size, dtype=torch.float32)
    if n == 0:
        return out
    failed = library.tt_grouped_experts(
        hidden.data_ptr(),
        hidden.stride(0),
        experts.data_ptr(),
        weights.data_ptr(),
        up.data_ptr(),
        down.data_ptr(),
        out.data_ptr(),
        n,
        top_k,
        total,
        size,
        width,
        torch.get_num_threads(),
    )
    check(failed, f"the experts of {n} tokens")
    return out


_op = torch.library.custom_op("twotower::cpu_grouped_experts", _run, mutates_args=(), device_types="cpu")
"""The form for compiled graphs, to which it is opaque."""


@_op.register_fake
def _(hidden: Tensor, experts: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return hidden.new_empty((experts.shape[0], up.shape[2]), dtype=torch.float32)
