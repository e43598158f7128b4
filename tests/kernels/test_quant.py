"""Both formats against rounding by exhaustion, their exactness in bf16, and the experts on stored weights."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from twotower_kernels import quant
from twotower_kernels.experts import all_experts
from twotower_kernels.quant import E4M3, GROUP, Format, NotQuantizable, dequantize, quantize, quantized_experts, row_error

FORMATS: list[Format] = ["fp8", "fp4"]
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E4M3_ALL = sorted({v for v in torch.arange(256, dtype=torch.uint8).view(E4M3).float().tolist() if 0 <= v <= 448})


def _weights(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _nearest(x: Fraction, values: list[float]) -> float:
    """The nearest of ascending values; of two as near, the one whose place, its code, is even; the greatest beyond it."""
    return min(values, key=lambda v: (abs(Fraction(v) - x), values.index(v) % 2))


def _by_hand(row: list[float], format: Format, matrix_largest: float) -> list[float]:
    """One row in exact arithmetic."""

    def power(largest: float, limit: float) -> Fraction:
        exponent = -100
        while Fraction(largest) > Fraction(limit) * Fraction(2) ** exponent:
            exponent += 1
        return Fraction(2) ** exponent

    def rounded(v: float, scale: Fraction, values: list[float]) -> float:
        return math.copysign(float(Fraction(_nearest(abs(Fraction(v)) / scale, values)) * scale) if scale else 0.0, v)

    if format == "fp8":
        scale = power(max(map(abs, row)), 448.0)
        return [rounded(v, scale, E4M3_ALL) for v in row]
    matrix_scale = power(matrix_largest, 6 * 448.0)
    out: list[float] = []
    for start in range(0, len(row), GROUP):
        group = row[start : start + GROUP]
        scale = Fraction(_nearest(max(abs(Fraction(v)) for v in group) / 6 / matrix_scale, E4M3_ALL)) * matrix_scale
        out += [rounded(v, scale, list(E2M1)) for v in group]
    return out


@pytest.mark.parametrize("format", FORMATS)
@given(st.lists(st.floats(-60000, 60000, width=16), min_size=1, max_size=40), st.integers(-60, 60))
@settings(max_examples=100, deadline=None)
def test_rounding_is_to_nearest_even(format: Format, row: list[float], exponent: int) -> None:
    # Few bits, as bf16 weights have: a quotient by a scale that is a tie is then found to be one in fp32 as well.
    weights = (torch.tensor([row], dtype=torch.float64) * 2.0**exponent).bfloat16()
    values = weights[0].tolist()
    assert dequantize(quantize(weights, format))[0].tolist() == _by_hand(values, format, max(map(abs, values)))


def test_ties() -> None:
    halfway = torch.tensor([[0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -0.25, -0.75, -5.0, 6.0, 5.9, 0.26, 0.0, -6.0, 1.0]])
    packed = quantize(448 * halfway, "fp4")  # the group's scale is then 448, exactly
    assert packed.scales.float().item() == 448.0
    expected = [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, -0.0, -1.0, -4.0, 6.0, 6.0, 0.5, 0.0, -6.0, 1.0]
    assert (dequantize(packed) / 448)[0].tolist() == expected


def test_layout_of_fp4() -> None:
    """The even input is in the low half of a byte; zeros fill up the last group."""
    row = torch.zeros(1, 18)
    row[0, 0], row[0, 1], row[0, 17] = 6.0, -3.0, 1.5
    packed = quantize(row, "fp4")
    assert packed.values.shape == (1, 16)
    assert packed.values[0, 0].item() == 0x7 | 0xD << 4
    assert packed.values[0, 8].item() == 0x7 << 4  # 1.5 is the greatest of its group: 6
    assert packed.values[0, 9:].count_nonzero() == 0
    assert packed.scales.shape == (1, 2)
    assert packed.matrix_scale is not None
    assert packed.matrix_scale.shape == ()


@pytest.mark.parametrize("format", FORMATS)
def test_stored_weights_are_exact_in_bf16_and_scales_are_powers_of_two(format: Format) -> None:
    for scale in (1e-30, 1e-3, 1.0, 1e20):
        packed = quantize(_weights(3, 20, 50, scale=scale), format)
        assert torch.equal(dequantize(packed, torch.bfloat16).float(), dequantize(packed))
        outer = packed.scales if packed.matrix_scale is None else packed.matrix_scale
        assert (outer.frexp().mantissa == 0.5).all()


@pytest.mark.parametrize(("format", "bytes_each"), [("fp8", 1.01), ("fp4", 0.57)])
def test_size_and_error(format: Format, bytes_each: float) -> None:
    weights = _weights(4, 256, 1024)
    packed = quantize(weights, format)
    assert packed.num_bytes <= bytes_each * weights.numel()
    error = row_error(dequantize(packed), weights)
    # Of normal weights: E4M3 keeps 3 bits behind the point, E2M1 one.
    low, high = {"fp8": (0.02, 0.03), "fp4": (0.08, 0.11)}[format]
    assert low < error.mean < high
    assert error.max < 1.3 * error.mean


@pytest.mark.parametrize("format", FORMATS)
def test_a_small_row_beside_a_large_one(format: Format) -> None:
    weights = _weights(2, 64)
    weights[1] *= 1e-3
    assert row_error(dequantize(quantize(weights, format)), weights).max < {"fp8": 0.04, "fp4": 0.15}[format]


@pytest.mark.parametrize("format", FORMATS)
def test_zeros_stay_zeros(format: Format) -> None:
    weights = _weights(3, 4, 48)
    weights[0] = 0.0
    weights[1, 2] = 0.0
    weights[2, :, 16:32] = 0.0
    back = dequantize(quantize(weights, format))
    assert back.isfinite().all()
    assert ((weights == 0) <= (back == 0)).all()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    ("bad", "named"), [(math.nan, "NaN"), (math.inf, "infinity"), (-math.inf, "infinity"), (2.0**121, "2")]
)
def test_what_cannot_be_stored_is_refused_by_name(format: Format, bad: float, named: str) -> None:
    weights = _weights(2, 3, 20)
    weights[1, 2, 19] = bad
    with pytest.raises(NotQuantizable, match=rf"{named}.*{format}"):
        quantize(weights, format)


@pytest.mark.parametrize("format", FORMATS)
def test_a_matrix_alone_and_in_a_stack(format: Format) -> None:
    stack = _weights(3, 5, 33)
    packed = quantize(stack, format)
    for i in range(3):
        for whole, alone in zip(packed.tensors, quantize(stack[i], format).tensors, strict=True):
            assert torch.equal(whole[i].float(), alone.float())
    picked = packed.select(torch.tensor([2, 0]))
    assert torch.equal(dequantize(picked), dequantize(packed)[[2, 0]])


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("n", [1, 2, 17])
def test_experts_on_stored_weights(format: Format, n: int) -> None:
    g = torch.Generator().manual_seed(n)
    hidden = torch.randn(n, 40, generator=g)
    chosen = torch.rand(n, 8, generator=g).argsort(-1)[:, :3]
    weights = torch.rand(n, 3, generator=g)
    up, down = quantize(_weights(8, 24, 40, seed=1), format), quantize(_weights(8, 40, 24, seed=2), format)
    out = quantized_experts(hidden, chosen, weights, up, down)
    expected = all_experts(hidden, chosen, weights, dequantize(up), dequantize(down))
    assert (out - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_errors_of_rows() -> None:
    exact = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1.0, 0.0]])
    error = row_error(exact + torch.tensor([[0.0, 0.5], [0.0, 0.0], [0.2, 0.0]]), exact)
    assert error.mean == pytest.approx((0.1 + 0.0 + 0.2) / 3)
    assert error.max == pytest.approx(0.2)
    assert row_error(exact + 1e-9, exact).max == math.inf
    typical = row_error(exact + torch.tensor([[0.0, 0.5], [0.1, 0.0], [0.2, 0.0]]), exact, typical=True)
    assert typical.max == pytest.approx(0.5 / math.sqrt(26 / 3))
    assert typical.mean == pytest.approx(0.8 / 3 / math.sqrt(26 / 3))


def test_every_e4m3_code_decodes() -> None:
    """Scales and values of a checkpoint come back as they were written."""
    codes = torch.arange(127, dtype=torch.uint8).view(E4M3).unsqueeze(0)
    packed = quant.Packed("fp8", 127, codes, torch.ones(1))
    assert dequantize(packed)[0].tolist() == E4M3_ALL
