"""RMSNorm with adaptive shift and scale on a CPU in bf16 (`norms.cpp`)."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from twotower_kernels import norms as plain
from twotower_kernels.cpu.build import address, library_for
from twotower_kernels.norms import Order


def modulated_norm(
    h: Tensor, weight: Tensor, eps: float, shift: Tensor | None = None, scale: Tensor | None = None, *, order: Order
) -> Tensor:
    """As `twotower_kernels.norms.modulated_norm`."""
    library = _library_for(h, weight, None, None, shift, scale)
    if library is None:
        return plain.modulated_norm(h, weight, eps, shift, scale, order=order)
    return _run(library, h, None, None, weight, eps, shift, scale, order)[1]


def add_modulated_norm(
    h: Tensor,
    x: Tensor,
    gate: Tensor | None,
    weight: Tensor,
    eps: float,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    order: Order,
) -> tuple[Tensor, Tensor]:
    """As `twotower_kernels.norms.add_modulated_norm`."""
    library = _library_for(h, weight, x, gate, shift, scale)
    if library is None:
        return plain.add_modulated_norm(h, x, gate, weight, eps, shift, scale, order=order)
    return _run(library, h, x, gate, weight, eps, shift, scale, order)


def _library_for(
    h: Tensor, weight: Tensor, x: Tensor | None, gate: Tensor | None, shift: Tensor | None, scale: Tensor | None
) -> ctypes.CDLL | None:
    fits = (
        h.is_contiguous()
        and weight.dtype == torch.float32
        and all(t is None or (t.dtype == torch.bfloat16 and t.stride(-1) == 1) for t in (h, x, gate, shift, scale))
        and (x is None or x.is_contiguous())
        and (shift is None or scale is None or shift.stride(0) == scale.stride(0))
    )
    return library_for(h, weight, x, gate, shift, scale) if fits else None


def _run(
    library: ctypes.CDLL,
    h: Tensor,
    x: Tensor | None,
    gate: Tensor | None,
    weight: Tensor,
    eps: float,
    shift: Tensor | None,
    scale: Tensor | None,
    order: Order,
) -> tuple[Tensor, Tensor]:
    added = h if x is None else torch.empty_like(h)
    out = torch.empty_like(h)
    library.tt_modulated_norm(
        *(h.data_ptr(), address(x), address(gate), 0 if gate is None else gate.stride(0)),
        *(address(shift), address(scale), 0 if shift is None else shift.stride(0), order == "modulate_first"),
        *(weight.data_ptr(), eps, added.data_ptr(), out.data_ptr()),
        *(h.numel() // h.shape[-1], h.shape[-2], h.shape[-1]),
        torch.get_num_threads(),
    )
    return added, out
