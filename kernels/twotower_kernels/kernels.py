"""The computations of a tower as one object, whose class decides which backend runs."""

from __future__ import annotations

from twotower_kernels import attention, block, experts, norms, prefill, scan, unmask
from twotower_kernels.linear import linear


class Kernels:
    """The computations of a tower in plain torch; other backends override them. Each is documented in its own module."""

    name = "torch"
    linear = staticmethod(linear)
    block_scan = staticmethod(block.block_scan)
    block_scan_factors = staticmethod(block.block_scan_factors)
    block_scan_commit = staticmethod(block.block_scan_commit)
    prefill_scan = staticmethod(prefill.prefill_scan)
    modulated_norm = staticmethod(norms.modulated_norm)
    add_modulated_norm = staticmethod(norms.add_modulated_norm)
    route = staticmethod(experts.route)
    run_experts = staticmethod(experts.run_experts)
    unmask = staticmethod(unmask.unmask)
    attend = staticmethod(attention.attend)
    attention = staticmethod(attention.block_attention)
    prompt_attention = staticmethod(prefill.prompt_attention)
    apply_factors_ = staticmethod(scan.apply_factors_)
    paged = False
    """Whether sessions are best addressed by slot and page numbers on the device; attention then reads pages."""


TORCH = Kernels()
