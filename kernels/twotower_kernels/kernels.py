"""The computations of a tower, as one object: which form of them runs is its class."""

from __future__ import annotations

from twotower_kernels import attention, block, experts, norms, prefill, scan, unmask
from twotower_kernels.linear import linear


class Kernels:
    """The computations of a tower in plain torch. What each does and takes, its own module tells; other backends override."""

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
    """Whether sessions of one pool are best named by numbers on the device: attention then goes by pages."""


TORCH = Kernels()
