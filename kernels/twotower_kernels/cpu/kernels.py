"""The computations of a tower on a CPU: our own kernels where they support the input, else plain torch."""

from __future__ import annotations

from twotower_kernels.cpu import attention, experts, linear, mamba, norms, router, unmask
from twotower_kernels.kernels import Kernels


class CpuKernels(Kernels):
    """In bf16, a row's bits do not depend on what else is in the batch."""

    name = "cpu"
    linear = staticmethod(linear.linear)
    block_scan = staticmethod(mamba.block_scan)
    block_scan_factors = staticmethod(mamba.block_scan_factors)
    block_scan_commit = staticmethod(mamba.block_scan_commit)
    prefill_scan = staticmethod(mamba.prefill_scan)
    modulated_norm = staticmethod(norms.modulated_norm)
    add_modulated_norm = staticmethod(norms.add_modulated_norm)
    route = staticmethod(router.route)
    run_experts = staticmethod(experts.run_experts)
    unmask = staticmethod(unmask.unmask)
    attend = staticmethod(attention.attend)
