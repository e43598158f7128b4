"""The computations of a tower by Triton kernels: on CUDA devices, and in Triton's interpreter."""

from __future__ import annotations

from twotower_kernels.kernels import Kernels
from twotower_kernels.triton import norms, scan


class TritonKernels(Kernels):
    """Products are the library's; what lies between them is ours."""

    name = "triton"
    block_scan = staticmethod(scan.block_scan)
    block_scan_commit = staticmethod(scan.block_scan_commit)
    modulated_norm = staticmethod(norms.modulated_norm)
    add_modulated_norm = staticmethod(norms.add_modulated_norm)
