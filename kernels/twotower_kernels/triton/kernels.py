"""The computations of a tower by Triton kernels: on CUDA devices, and in Triton's interpreter."""

from __future__ import annotations

import torch
from torch import Tensor

from twotower_kernels import experts as plain_experts
from twotower_kernels.kernels import Kernels
from twotower_kernels.triton import attention, factors, norms, prefill, router, scan, unmask
from twotower_kernels.triton.experts import grouped_experts


def run_experts(
    hidden: Tensor, experts: Tensor, weights: Tensor, up: Tensor, down: Tensor, wide: Tensor | None = None
) -> Tensor:
    """As `twotower_kernels.experts.run_experts`, which it calls where gradients are needed."""
    if torch.is_grad_enabled() and (up.requires_grad or hidden.requires_grad):
        return plain_experts.run_experts(hidden, experts, weights, up, down, wide)
    return grouped_experts(hidden, experts, weights, up, down)


def apply_factors_(
    state: Tensor,
    x: Tensor,
    b: Tensor,
    dt: Tensor,
    a: Tensor,
    *,
    slots: Tensor | None = None,
    counts: Tensor | None = None,
) -> None:
    """As `twotower_kernels.scan.apply_factors_`, to the same bits."""
    factors.apply_factors(state, x, b, dt, a, slots=slots, counts=counts, out=None if slots is not None else state)


class TritonKernels(Kernels):
    """Dense products are the library's; all other kernels are our own."""

    name = "triton"
    paged = True
    block_scan = staticmethod(scan.block_scan)
    block_scan_factors = staticmethod(scan.block_scan_factors)
    block_scan_commit = staticmethod(scan.block_scan_commit)
    prefill_scan = staticmethod(prefill.prefill_scan)
    modulated_norm = staticmethod(norms.modulated_norm)
    add_modulated_norm = staticmethod(norms.add_modulated_norm)
    route = staticmethod(router.route)
    run_experts = staticmethod(run_experts)
    unmask = staticmethod(unmask.unmask)
    attention = staticmethod(attention.block_attention)
    prompt_attention = staticmethod(prefill.prompt_attention)
    apply_factors_ = staticmethod(apply_factors_)
