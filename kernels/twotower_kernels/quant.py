"""Matrices of routed experts in 8 or 4 bits: how they are stored, rounded, and computed with in plain torch.

Two formats of a matrix (O outputs, C inputs), or of stacks of them:

- **fp8**: E4M3 values, one fp32 scale for each output row. Finer blocks would buy next to nothing: E4M3 is a floating
  point format whose relative error is the same over 15 octaves, so that a row's small weights do not suffer from its
  large ones. And a row's scale leaves the sum over inputs, so that a kernel multiplies once for each output.
- **fp4**: the layout of NVFP4. E2M1 values (0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives), which reach over 3.5
  octaves only; hence an E4M3 scale for each group of 16 inputs, and one fp32 scale for the matrix. Two values a byte,
  the even input in the low half; behind the last input, zeros fill up its group.

The fp32 scales are powers of two, and this costs no precision, because what lies below them floats by itself. It makes
a stored weight, value x scale (x scale), a number of at most 6 significant bits, exact in bf16 as in fp32: every
device, dtype and kernel computes with the very same weights, and none rounds them a second time.

All rounding is to the nearest, ties to even; what a scale's own rounding puts beyond the greatest value becomes that.
All-zero rows and groups stay zero. Weights of 2^120 and above, infinities and NaN are refused.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from twotower_kernels.experts import grouped_experts

Format = Literal["fp8", "fp4"]

GROUP = 16
"""Inputs that share a scale in fp4."""

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0
E2M1_MAX = 6.0

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_LEAST_EXPONENT = -100
"""Of a power-of-two scale; smaller weights lose bits, or become 0."""
_TOO_LARGE = 2.0**120
"""A scale beyond it could make infinities of what was finite."""


class NotQuantizable(ValueError):
    """The weights hold values that no format here can express; the message names them."""


@dataclass(frozen=True, slots=True)
class Packed:
    """Matrices (..., O, C) as they are stored. G = ceil(C / 16) groups."""

    format: Format
    inputs: int
    """C, the inputs of a matrix."""
    values: Tensor
    """fp8: (..., O, C) float8_e4m3fn; fp4: (..., O, 8 G) uint8."""
    scales: Tensor
    """fp8: (..., O) fp32, powers of two; fp4: (..., O, G) float8_e4m3fn, not negative."""
    matrix_scale: Tensor | None = None
    """fp4: (...) fp32, powers of two. fp8: None."""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Values, scales and, in fp4, the matrices' scales."""
        return (self.values, self.scales) if self.matrix_scale is None else (self.values, self.scales, self.matrix_scale)

    @property
    def outputs(self) -> int:
        """O, the outputs of a matrix."""
        return self.values.shape[-2]

    @property
    def num_bytes(self) -> int:
        """The bytes of all tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors)

    def select(self, index: Tensor) -> Packed:
        """Some of a stack's matrices: index (n,) int64 along the first axis; copies."""
        return Packed(self.format, self.inputs, *(_take(tensor, index) for tensor in self.tensors))


def quantize(weights: Tensor, format: Format) -> Packed:
    """Round weights (..., O, C) of any float dtype to a format. Raises NotQuantizable."""
    weights = weights.detach().float()
    largest = weights.abs().amax((-2, -1))
    if not bool((largest < _TOO_LARGE).all()):
        kind = "NaN" if weights.isnan().any() else "infinity" if weights.isinf().any() else "a weight of 2^120 or more"
        raise NotQuantizable(f"{kind} cannot be stored in {format}")
    return _to_fp8(weights) if format == "fp8" else _to_fp4(weights, largest)


def dequantize(packed: Packed, dtype: torch.dtype = torch.float32) -> Tensor:
    """The stored weights (..., O, C), exact in bf16 as in fp32."""
    if packed.matrix_scale is None:
        return (packed.values.float() * packed.scales.unsqueeze(-1)).to(dtype)
    table = torch.tensor([*_E2M1, *(-v for v in _E2M1)], device=packed.values.device)
    codes = torch.stack((packed.values & 15, packed.values >> 4), -1).flatten(-2)
    scales = packed.scales.float() * packed.matrix_scale[..., None, None]
    grouped = table[codes.int()].unflatten(-1, (-1, GROUP)) * scales.unsqueeze(-1)
    return grouped.flatten(-2)[..., : packed.inputs].to(dtype)


def quantized_experts(hidden: Tensor, experts: Tensor, weights: Tensor, up: Packed, down: Packed) -> Tensor:
    """As `twotower_kernels.experts.grouped_experts` on the stored weights: the reference for the kernels.

    hidden (N, H), experts (N, k) int64, weights (N, k) fp32, up (E, I, H), down (E, H, I). Unpacks the experts that are
    chosen, and waits for the device to learn which these are. Returns (N, H) fp32.
    """
    chosen, at = experts.unique(return_inverse=True)
    matrices = (dequantize(packed.select(chosen), hidden.dtype) for packed in (up, down))
    return grouped_experts(hidden, at, weights, *matrices)


@dataclass(frozen=True, slots=True)
class RowError:
    """The relative error of rows."""

    mean: float
    max: float


def row_error(approximate: Tensor, exact: Tensor, *, typical: bool = False) -> RowError:
    """|approximate - exact| / |exact| of rows (..., D), in the 2-norm; for a row of zeros, 0 if it is exact, else infinite.

    typical: divide by the root mean square of all rows' |exact| instead, for rows that may by chance be close to zero.
    """
    distance = (approximate.double() - exact.double()).norm(dim=-1)
    lengths = exact.double().norm(dim=-1)
    error = torch.where(distance == 0, 0.0, distance / (lengths.square().mean().sqrt() if typical else lengths))
    return RowError(float(error.mean()), float(error.max()))


def _to_fp8(weights: Tensor) -> Packed:
    scales = _power_of_two(weights.abs().amax(-1), E4M3_MAX)
    return Packed("fp8", weights.shape[-1], _e4m3(weights / scales.unsqueeze(-1)), scales)


def _to_fp4(weights: Tensor, largest: Tensor) -> Packed:
    inputs = weights.shape[-1]
    matrix_scale = _power_of_two(largest, E2M1_MAX * E4M3_MAX)
    scaled = F.pad(weights / matrix_scale[..., None, None], (0, -inputs % GROUP)).unflatten(-1, (-1, GROUP))
    scales = _e4m3(scaled.abs().amax(-1) / E2M1_MAX)
    divisor = scales.float().unsqueeze(-1)
    codes = _e2m1(torch.where(divisor > 0, scaled / divisor, 0.0)).flatten(-2)
    return Packed("fp4", inputs, codes[..., 0::2] | codes[..., 1::2] << 4, scales, matrix_scale)


def _power_of_two(largest: Tensor, limit: float) -> Tensor:
    """The least power of two p >= 2^-100 with largest <= limit p, computed on the bits, so that it is exact on any device."""
    mantissa, exponent = math.frexp(limit)
    bits = largest.view(torch.int32)
    above = (bits & 0x7FFFFF) > int((2 * mantissa - 1) * 2**23)
    power = (bits >> 23) - 126 - exponent + above.int()
    return ((power.clamp_min(_LEAST_EXPONENT) + 127) << 23).view(torch.float32)


def _e4m3(x: Tensor) -> Tensor:
    """Nearest E4M3, ties to even; 448 beyond the greatest."""
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(E4M3)


def _e2m1(x: Tensor) -> Tensor:
    """Codes, uint8, of the nearest E2M1 values, ties to the even code, 6 beyond the greatest; bit 3 is the sign."""
    # The lower borders of the codes; a value on a border gets the even one of its two codes.
    borders = torch.tensor([(low + high) / 2 for low, high in itertools.pairwise(_E2M1)], device=x.device)
    to_even = torch.tensor([upper % 2 == 0 for upper in range(1, len(_E2M1))], device=x.device)
    borders = torch.where(to_even, borders.nextafter(torch.zeros_like(borders)), borders)
    codes = torch.bucketize(x.abs(), borders)  # counts the borders strictly below
    return (codes | x.signbit().long() << 3).to(torch.uint8)


def _take(tensor: Tensor, index: Tensor) -> Tensor:
    """index_select along the first axis, which torch lacks for 8-bit floats."""
    if tensor.dtype is E4M3:
        return tensor.view(torch.uint8).index_select(0, index).view(E4M3)
    return tensor.index_select(0, index)
