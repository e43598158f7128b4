"""The grouped expert kernels on stored weights, against a loop in fp64 and against the plain torch form."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from twotower_kernels import quant as plain
from twotower_kernels.experts import relu2
from twotower_kernels.quant import E4M3, Format, Packed, dequantize, quantize

pytest.importorskip("triton")

from twotower_kernels.triton.common import interpreted
from twotower_kernels.triton.quant import quantized_experts

pytestmark = pytest.mark.device

DEVICE = "cpu" if interpreted() else "cuda"
DTYPES = [torch.float32, torch.bfloat16]
FORMATS: list[Format] = ["fp8", "fp4"]

Inputs = tuple[Tensor, Tensor, Tensor, Packed, Packed]


def _inputs(
    n: int, format: Format, dtype: torch.dtype = torch.float32, *, experts: int = 8, hidden: int = 48, width: int = 32
) -> Inputs:
    g = torch.Generator().manual_seed(n)
    x = torch.randn(n, hidden, generator=g).to(DEVICE, dtype)
    chosen = torch.rand(n, experts, generator=g).argsort(-1)[:, :3].contiguous().to(DEVICE)
    weights = torch.rand(n, 3, generator=g).to(DEVICE)
    up = quantize((torch.randn(experts, width, hidden, generator=g) / math.sqrt(hidden)).to(DEVICE), format)
    down = quantize((torch.randn(experts, hidden, width, generator=g) / math.sqrt(width)).to(DEVICE), format)
    return x, chosen, weights, up, down


def _loop(hidden: Tensor, experts: Tensor, weights: Tensor, up: Packed, down: Packed) -> Tensor:
    """fp64, but rounded between the projections as the kernels do."""
    ups, downs = dequantize(up).double(), dequantize(down).double()
    out = torch.zeros(hidden.shape, dtype=torch.float64, device=hidden.device)
    for i in range(hidden.shape[0]):
        for e, w in zip(experts[i].tolist(), weights[i].double(), strict=True):
            mid = relu2(ups[e] @ hidden[i].double()).to(hidden.dtype)
            out[i] += w * (downs[e] @ mid.double())
    return out


def _check(inputs: Inputs, block_rows: int | None = None) -> Tensor:
    out = quantized_experts(*inputs, block_rows=block_rows)
    expected = _loop(*inputs)
    assert out.dtype is torch.float32
    # In bf16 what is rounded to either side between the projections makes the difference.
    limit = 1e-5 if inputs[0].dtype is torch.float32 else 4e-3
    assert (out.double() - expected).abs().max() <= limit * expected.abs().max()
    return out


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 2, 16, 65])
def test_a_loop_and_the_plain_form(n: int, dtype: torch.dtype, format: Format) -> None:
    inputs = _inputs(n, format, dtype)
    out = _check(inputs)
    reference = plain.quantized_experts(*inputs)  # in bf16 rounded three times more
    limit = 1e-5 if dtype is torch.float32 else 2e-2
    assert (out - reference).abs().max() <= limit * reference.abs().max()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("hidden", "width"), [(1, 1), (70, 33), (33, 130), (200, 48), (300, 17)])
def test_sizes_that_no_block_and_no_group_divides(hidden: int, width: int, format: Format) -> None:
    for dtype in DTYPES:
        _check(_inputs(9, format, dtype, hidden=hidden, width=width))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("block_rows", [16, 64])
@pytest.mark.parametrize("taken", [[7, 0, 3], [5, 6, 7]])
def test_experts_with_all_tokens_and_experts_with_none(taken: list[int], block_rows: int, format: Format) -> None:
    hidden, _, weights, up, down = _inputs(37, format)
    _check((hidden, torch.tensor([taken], device=DEVICE).expand(37, 3), weights, up, down), block_rows)


@pytest.mark.parametrize("format", FORMATS)
def test_every_code_is_decoded_exactly(format: Format) -> None:
    """A unit vector as the token reads off single weights: through relu2 and a constant, their squares."""
    if format == "fp8":
        codes = torch.arange(127, dtype=torch.uint8).view(E4M3)
        up = Packed("fp8", 127, codes.view(1, 1, 127), torch.full((1, 1), 2.0**-8))
        one = torch.full((1, 1, 1), 1.0).to(E4M3)
        down = Packed("fp8", 1, one.expand(1, 127, 1).contiguous(), torch.ones(1, 127))
        size = 127
    else:
        # 126 groups, each with all 16 codes and a scale of its own, of all there are.
        pairs = torch.arange(0, 16, 2, dtype=torch.uint8)
        values = (pairs | (pairs + 1) << 4).repeat(126).view(1, 1, -1)
        size = 126 * 16
        scales = torch.arange(1, 127, dtype=torch.uint8).view(E4M3).view(1, 1, -1)
        up = Packed("fp4", size, values, scales, torch.full((1,), 2.0**-12))
        down = quantize(torch.full((1, size, 1), 6.0), "fp4")  # exactly: the greatest value, times a power of two
    up, down = (Packed(p.format, p.inputs, *(t.to(DEVICE) for t in p.tensors)) for p in (up, down))
    exact, factor = dequantize(up)[0, 0], dequantize(down)[0, 0]
    at = torch.arange(0, size, 1 if format == "fp8" else 7, device=DEVICE)
    hidden = torch.zeros(at.numel(), size, device=DEVICE).scatter_(1, at.unsqueeze(1), 1.0)
    experts = torch.zeros(at.numel(), 1, dtype=torch.int64, device=DEVICE)
    out = quantized_experts(hidden, experts, torch.ones(at.numel(), 1, device=DEVICE), up, down)
    assert torch.equal(out[:, 0], factor * relu2(exact[at]))
    hidden.neg_()
    out = quantized_experts(hidden, experts, torch.ones(at.numel(), 1, device=DEVICE), up, down)
    assert torch.equal(out[:, 0], factor * relu2(-exact[at]))


@pytest.mark.parametrize("format", FORMATS)
def test_nan_stays_in_its_token(format: Format) -> None:
    inputs = _inputs(12, format)
    clean = quantized_experts(*inputs)
    inputs[0][4, 7] = math.nan
    out = quantized_experts(*inputs)
    assert out[4].isnan().all()
    others = torch.arange(12, device=DEVICE) != 4
    assert torch.equal(out[others], clean[others])


@pytest.mark.parametrize("format", FORMATS)
def test_a_token_has_the_same_bits_alone_in_a_batch_and_from_run_to_run(format: Format) -> None:
    hidden, chosen, weights, up, down = _inputs(20, format)
    whole = quantized_experts(hidden, chosen, weights, up, down, block_rows=16)
    assert torch.equal(whole, quantized_experts(hidden, chosen, weights, up, down, block_rows=16))
    for i in (0, 7, 19):
        row = slice(i, i + 1)
        alone = quantized_experts(hidden[row], chosen[row], weights[row], up, down, block_rows=16)
        # The interpreter's matrix product is numpy's, whose order of sums depends on shapes and alignment.
        torch.testing.assert_close(alone, whole[row], rtol=1e-6 if interpreted() else 0, atol=1e-6 if interpreted() else 0)


@pytest.mark.parametrize("format", FORMATS)
def test_no_tokens(format: Format) -> None:
    hidden, chosen, weights, up, down = _inputs(1, format)
    assert quantized_experts(hidden[:0], chosen[:0], weights[:0], up, down).shape == (0, 48)
