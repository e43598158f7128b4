"""The short causal convolution in front of the scan."""

from __future__ import annotations

from torch import Tensor


def causal_conv(columns: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Depthwise convolution along the length, as K shifted products: with K = 4, several times faster than conv1d on a CPU.

    columns (B, K - 1 + L, C): the K - 1 columns before the L positions, then theirs; weight (C, 1, K); bias (C,).
    Returns (B, L, C) in the dtype of `columns`; sums are fp32.
    """
    kernel = weight.shape[-1]
    length = columns.shape[1] - kernel + 1
    assert length >= 1
    assert weight.shape[:2] == (columns.shape[2], 1)
    taps = weight.squeeze(1).float().t()
    wide = columns.float()
    out = wide[:, :length] * taps[0]
    for k in range(1, kernel):
        out = out.addcmul(wide[:, k : k + length], taps[k])
    if bias is not None:
        out = out + bias.float()
    return out.to(columns.dtype)
