"""The choice of experts on a CPU in bf16 (`router.cpp`)."""

from __future__ import annotations

import torch
from torch import Tensor

from twotower_kernels.cpu.build import check, library_for
from twotower_kernels.experts import route as plain

LANES = 8
"""The hidden size and the number of experts must be multiples of this."""


def route(
    hidden: Tensor,
    weight: Tensor,
    correction: Tensor,
    *,
    top_k: int,
    groups: int,
    top_groups: int,
    normalize: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """As `twotower_kernels.experts.route`; of equal experts the lower comes first."""
    fits = (
        groups == 1
        and hidden.dtype == torch.bfloat16
        and hidden.is_contiguous()
        and weight.dtype == torch.float64
        and weight.is_contiguous()
        and weight.shape[0] % LANES == weight.shape[1] % LANES == 0
    )
    library = library_for(hidden, weight) if fits else None
    if library is None:
        limits = {"top_k": top_k, "groups": groups, "top_groups": top_groups}
        return plain(hidden, weight, correction, **limits, normalize=normalize, scale=scale)
    n, size = hidden.shape
    chosen = torch.empty(n, top_k, dtype=torch.int64)
    weights = torch.empty(n, top_k)
    correction = correction.double().contiguous()
    failed = library.tt_route(
        *(hidden.data_ptr(), weight.data_ptr(), correction.data_ptr(), chosen.data_ptr(), weights.data_ptr()),
        *(n, size, weight.shape[0], top_k, normalize, scale, torch.get_num_threads()),
    )
    check(failed, f"the routing of {n} tokens")
    return chosen, weights
