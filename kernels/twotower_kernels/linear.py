"""A projection, in plain torch."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    add: Tensor | None = None,
    relu2: bool = False,
    wide: bool = False,
) -> Tensor:
    """x (..., H) times weight (O, H) transposed, plus bias (O,) -> (..., O), in x's dtype; summed in fp32, or fp64 for fp64.

    add: (..., O) fp32, added to the product. relu2: then take relu(.) squared. wide: return the rounded result as fp32.
    """
    out = F.linear(x, weight, bias)
    if add is not None:
        out = add.to(out.dtype) + out
    if relu2:
        out = F.relu(out).square()
    return out.float() if wide else out
