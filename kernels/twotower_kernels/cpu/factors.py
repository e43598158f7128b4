"""A commit's delta applied to the state on a CPU in bf16 (`mamba.cpp`)."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from twotower_kernels.cpu.build import address, library_for


def library_for_factors(ssm: Tensor, x: Tensor, b: Tensor, dt: Tensor) -> ctypes.CDLL | None:
    """The kernels, if `apply_factors` can take these tensors."""
    fits = x.dtype == b.dtype == torch.bfloat16 and ssm.dtype == dt.dtype == torch.float32 and ssm.shape[-2] % 4 == 0
    fits = fits and all(t.is_contiguous() for t in (ssm, x, b, dt))
    return library_for(ssm, x, b, dt) if fits else None


def apply_factors(
    library: ctypes.CDLL,
    ssm: Tensor,
    x: Tensor,
    b: Tensor,
    dt: Tensor,
    decay: Tensor,
    slots: Tensor | None,
    counts: Tensor | None,
) -> None:
    """As `twotower_kernels.scan.apply_factors_`; all with a batch axis and contiguous, decay = exp(dt a) (B, L, h)."""
    batch, length, heads, head_dim = x.shape
    assert counts is None or (counts.dtype == torch.int64 and counts.is_contiguous())
    library.tt_apply_factors(
        *(ssm.data_ptr(), address(slots), address(counts), x.data_ptr(), b.data_ptr(), dt.data_ptr(), decay.data_ptr()),
        *(batch, length, heads, head_dim, *b.shape[2:]),
        torch.get_num_threads(),
    )
