"""The causal convolution against torch's own."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from twotower_kernels.conv import causal_conv


@pytest.mark.parametrize("kernel", [1, 2, 4])
@pytest.mark.parametrize("length", [1, 3, 16, 100])
def test_equals_conv1d(kernel: int, length: int) -> None:
    g = torch.Generator().manual_seed(0)
    columns = torch.randn(3, kernel - 1 + length, 10, generator=g)
    weight, bias = torch.randn(10, 1, kernel, generator=g), torch.randn(10, generator=g)
    expected = F.conv1d(columns.transpose(1, 2), weight, bias, groups=10).transpose(1, 2)
    torch.testing.assert_close(causal_conv(columns, weight, bias), expected, rtol=1e-5, atol=1e-5)


def test_bf16_sums_in_fp32() -> None:
    g = torch.Generator().manual_seed(0)
    columns, weight = torch.randn(1, 19, 64, generator=g).bfloat16(), torch.randn(64, 1, 4, generator=g).bfloat16()
    exact = causal_conv(columns.float(), weight.float(), None)
    assert torch.equal(causal_conv(columns, weight, None), exact.bfloat16())
