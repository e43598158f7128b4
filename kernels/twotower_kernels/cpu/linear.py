"""A projection on a CPU in bf16 (`products.cpp`)."""

from __future__ import annotations

import torch
from torch import Tensor

from twotower_kernels.cpu.build import MIN_OUTPUTS, address, library_for
from twotower_kernels.linear import linear as plain


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    add: Tensor | None = None,
    relu2: bool = False,
    wide: bool = False,
) -> Tensor:
    """As `twotower_kernels.linear.linear`.

    Our own product is used for any number of rows: it is the faster one up to about 64 (2.4x at 1 row, 1.7x at 16,
    since a library packs the weights at every call), and a row's bits do not depend on how many other rows the batch
    has, so that a text does not depend on the batch it was written in.
    """
    fits = (
        x.dtype == weight.dtype == torch.bfloat16
        and x.numel() > 0
        and weight.shape[0] >= MIN_OUTPUTS
        and weight.is_contiguous()
        and (add is None or (add.dtype == torch.float32 and add.is_contiguous()))
    )
    library = library_for(x, weight, bias, add) if fits else None
    if library is None:
        return plain(x, weight, bias, add=add, relu2=relu2, wide=wide)
    rows, size = x.numel() // x.shape[-1], x.shape[-1]
    flat = x.reshape(rows, size)
    if flat.stride(-1) != 1:
        flat = flat.contiguous()
    out = torch.empty(*x.shape[:-1], weight.shape[0], dtype=torch.float32 if wide else torch.bfloat16)
    library.tt_linear(
        *(flat.data_ptr(), flat.stride(0), weight.data_ptr(), address(bias), address(add), out.data_ptr()),
        *(rows, size, weight.shape[0]),
        *(relu2, wide, torch.get_num_threads()),
    )
    return out
