"""The first positions of a block alone, by the kernel, to the bits of the plain form."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from twotower_kernels.scan import apply_factors_ as plain

pytest.importorskip("triton")

from twotower_kernels.triton.common import interpreted
from twotower_kernels.triton.kernels import apply_factors_

DEVICE = "cpu" if interpreted() else "cuda"


def _draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pooled", [True, False])
@pytest.mark.parametrize("length", [1, 7, 16])
def test_each_row_takes_its_own_count(length: int, pooled: bool, dtype: torch.dtype) -> None:
    heads, head_dim, groups, n = 4, 6, 2, 20
    x, b = (_draw(4, length, *shape).to(DEVICE, dtype) for shape in ((heads, head_dim), (groups, n)))
    dt, a = _draw(4, length, heads).abs().to(DEVICE), -_draw(heads).abs().to(DEVICE)
    counts = torch.tensor([0, 1, length, (length + 1) // 2], device=DEVICE)
    slots = torch.tensor([5, 0, 3, 1], device=DEVICE) if pooled else None
    state = _draw(6 if pooled else 4, heads, head_dim, n).to(DEVICE)
    state[:, 0, 0] = -0.0
    expected = state.clone()
    apply_factors_(state, x, b, dt, a, slots=slots, counts=counts)
    plain(expected, x, b, dt, a, slots=slots, counts=counts)
    assert torch.equal(state.view(torch.int32), expected.view(torch.int32))
