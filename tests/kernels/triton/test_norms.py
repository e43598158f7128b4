"""The norm kernels against the plain torch form, that form against the formulas, and the choice between the two.

Everything but the kernels runs without triton, too.
"""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import Tensor

from twotower_kernels import norms as plain
from twotower_kernels.norms import Order

DTYPES = [torch.float32, torch.bfloat16]
ORDERS: list[Order] = ["modulate_first", "norm_first"]
pytestmark = pytest.mark.device

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-5


@pytest.fixture(name="kernels")
def _kernels() -> ModuleType:
    pytest.importorskip("triton")
    from twotower_kernels.triton import norms

    return norms


def _inputs(batch: int, length: int, hidden: int, dtype: torch.dtype, scale: float = 1.0) -> tuple[Tensor, ...]:
    """h, x, weight, gate, shift, scale."""
    g = torch.Generator().manual_seed(hidden + length)
    h, x = (scale * torch.randn(2, batch, length, hidden, generator=g)).to(DEVICE, dtype).unbind(0)
    # As the model has them: slices of one tensor for all layers.
    vectors = torch.randn(batch, 3, 1, hidden, generator=g).to(DEVICE, dtype)
    weight = torch.randn(hidden, generator=g).to(DEVICE)
    return h, x, weight, *(vectors[:, i] for i in range(3))


def _close(got: Tensor, expected: Tensor) -> None:
    assert got.dtype is expected.dtype
    # In bf16 one place at most, where fp32 falls to the two sides of a border.
    limit = 2e-6 if got.dtype is torch.float32 else 2**-7
    torch.testing.assert_close(got, expected, rtol=limit, atol=1e-6 if got.dtype is torch.float32 else 1e-3)


@pytest.mark.parametrize("order", ORDERS)
def test_the_plain_form_is_the_formula(order: Order) -> None:
    h, x, weight, gate, shift, scale = (t.double() for t in _inputs(2, 3, 8, torch.float32))

    def norm(v: Tensor) -> Tensor:
        return v / (v.square().mean(-1, keepdim=True) + EPS).sqrt() * weight

    def modulate(v: Tensor) -> Tensor:
        return v * (1 + scale) + shift

    added = h + gate * x
    expected = norm(modulate(added)) if order == "modulate_first" else modulate(norm(added))
    h32, x32, weight32, gate32, shift32, scale32 = _inputs(2, 3, 8, torch.float32)
    got_added, got = plain.add_modulated_norm(h32, x32, gate32, weight32, EPS, shift32, scale32, order=order)
    torch.testing.assert_close(got_added, added.float())
    torch.testing.assert_close(got, expected.float())
    torch.testing.assert_close(plain.modulated_norm(h32, weight32, EPS, order=order), norm(h).float())


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "length", "hidden"), [(1, 1, 1), (2, 16, 64), (3, 5, 100), (1, 3, 2688)])
def test_kernels(kernels: ModuleType, batch: int, length: int, hidden: int, dtype: torch.dtype, order: Order) -> None:
    h, x, weight, gate, shift, scale = _inputs(batch, length, hidden, dtype)
    before = h.clone()
    _close(
        kernels.modulated_norm(h, weight, EPS, shift, scale, order=order),
        plain.modulated_norm(h, weight, EPS, shift, scale, order=order),
    )
    added, normed = kernels.add_modulated_norm(h, x, gate, weight, EPS, shift, scale, order=order)
    _close(added, plain.add_modulated_norm(h, x, gate, weight, EPS, shift, scale, order=order)[0])
    _close(normed, plain.modulated_norm(added, weight, EPS, shift, scale, order=order))
    assert torch.equal(h, before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_modulation_and_gate(kernels: ModuleType, dtype: torch.dtype) -> None:
    h, x, weight, gate, *_ = _inputs(2, 4, 48, dtype)
    _close(kernels.modulated_norm(h, weight, EPS, order="norm_first"), plain.modulated_norm(h, weight, EPS, order="norm_first"))
    for factor in (None, gate):
        got = kernels.add_modulated_norm(h, x, factor, weight, EPS, order="modulate_first")
        expected = plain.add_modulated_norm(h, x, factor, weight, EPS, order="modulate_first")
        _close(got[0], expected[0])
        _close(got[1], plain.modulated_norm(got[0], weight, EPS, order="norm_first"))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("scale", [0.0, 1e-20, 1e-3, 1e15])
def test_extreme_values(kernels: ModuleType, scale: float, order: Order) -> None:
    for dtype in DTYPES:
        h, _, weight, _, shift, factor = _inputs(1, 4, 100, dtype, scale)
        got = kernels.modulated_norm(h, weight, EPS, shift, factor, order=order)
        assert got.isfinite().all()
        _close(got, plain.modulated_norm(h, weight, EPS, shift, factor, order=order))


def test_nan_stays_in_its_position(kernels: ModuleType) -> None:
    h, x, weight, gate, shift, scale = _inputs(1, 3, 40, torch.float32)
    clean = kernels.add_modulated_norm(h, x, gate, weight, EPS, shift, scale, order="norm_first")[1]
    x[0, 1, 7] = torch.nan
    got = kernels.add_modulated_norm(h, x, gate, weight, EPS, shift, scale, order="norm_first")[1]
    assert got[0, 1].isnan().all()
    assert torch.equal(got[0, ::2], clean[0, ::2])


def test_strided_rows_and_one_modulation_for_all(kernels: ModuleType) -> None:
    h, x, weight, gate, shift, scale = _inputs(3, 4, 32, torch.float32)
    h, x = torch.cat([h, x], -1)[..., :32], x.transpose(0, 1).contiguous().transpose(0, 1)
    shift, scale = (v[:1].expand(3, 1, 32) for v in (shift, scale))
    got = kernels.add_modulated_norm(h, x, gate, weight, EPS, shift, scale, order="norm_first")
    expected = plain.add_modulated_norm(h, x, gate, weight, EPS, shift, scale, order="norm_first")
    _close(got[0], expected[0])
    _close(got[1], expected[1])


def test_nothing_to_norm(kernels: ModuleType) -> None:
    h, _, weight, *_ = _inputs(2, 3, 8, torch.float32)
    assert kernels.modulated_norm(h[:0], weight, EPS, order="norm_first").shape == (0, 3, 8)
