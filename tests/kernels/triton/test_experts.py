"""The grouped expert kernels against a loop in fp64, and against the plain torch form."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from twotower_kernels import experts as plain

pytest.importorskip("triton")

from twotower_kernels.triton.common import interpreted
from twotower_kernels.triton.experts import choose_rows, grouped_experts

pytestmark = pytest.mark.device

DEVICE = "cpu" if interpreted() else "cuda"
DTYPES = [torch.float32, torch.bfloat16]


def _inputs(
    n: int,
    dtype: torch.dtype = torch.float32,
    *,
    experts: int = 8,
    top_k: int = 3,
    hidden: int = 24,
    width: int = 16,
    scale: float = 1.0,
) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(n)
    x = scale * torch.randn(n, hidden, generator=g)
    chosen = torch.rand(n, experts, generator=g).argsort(-1)[:, :top_k].contiguous()
    weights = torch.rand(n, top_k, generator=g)
    up = torch.randn(experts, width, hidden, generator=g) / math.sqrt(hidden)
    down = torch.randn(experts, hidden, width, generator=g) / math.sqrt(width)
    return x.to(DEVICE, dtype), chosen.to(DEVICE), weights.to(DEVICE), up.to(DEVICE, dtype), down.to(DEVICE, dtype)


def _loop(hidden: Tensor, experts: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """fp64, but rounded between the projections as the kernels do."""
    out = torch.zeros(hidden.shape, dtype=torch.float64, device=hidden.device)
    for i in range(hidden.shape[0]):
        for e, w in zip(experts[i].tolist(), weights[i].double(), strict=True):
            mid = plain.relu2(up[e].double() @ hidden[i].double()).to(hidden.dtype)
            out[i] += w * (down[e].double() @ mid.double())
    return out


def _check(inputs: tuple[Tensor, ...], block_rows: int | None = None) -> Tensor:
    out = grouped_experts(*inputs, block_rows=block_rows)
    expected = _loop(*inputs)
    assert out.dtype is torch.float32
    assert out.shape == inputs[0].shape
    assert out.isfinite().all()
    # In bf16 what is rounded to either side between the projections makes the difference.
    limit = 1e-5 if inputs[0].dtype is torch.float32 else 4e-3
    assert (out.double() - expected).abs().max() <= limit * expected.abs().max()
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 2, 16, 65])
def test_a_loop(n: int, dtype: torch.dtype) -> None:
    inputs = _inputs(n, dtype)
    out = _check(inputs)
    reference = plain.grouped_experts(*inputs)  # in bf16 rounded three times more
    limit = 1e-5 if dtype is torch.float32 else 2e-2
    assert (out - reference).abs().max() <= limit * reference.abs().max()


@pytest.mark.parametrize("block_rows", [16, 64])
@pytest.mark.parametrize("taken", [[7, 0, 3], [0, 1, 2], [5, 6, 7]])
def test_experts_with_all_tokens_and_experts_with_none(taken: list[int], block_rows: int) -> None:
    hidden, _, weights, up, down = _inputs(37)
    _check((hidden, torch.tensor([taken], device=DEVICE).expand(37, 3), weights, up, down), block_rows)


def test_one_expert_with_everything() -> None:
    hidden, _, weights, up, down = _inputs(70)
    chosen = torch.full((70, 1), 5, device=DEVICE)
    _check((hidden, chosen, weights[:, :1].contiguous(), up, down), 16)


def test_only_one_expert() -> None:
    _check(_inputs(5, experts=1, top_k=1))


@pytest.mark.parametrize(("hidden", "width"), [(1, 1), (70, 33), (33, 130), (200, 48)])
def test_sizes_that_no_block_divides(hidden: int, width: int) -> None:
    for dtype in DTYPES:
        _check(_inputs(9, dtype, hidden=hidden, width=width))


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_small_and_large_values(scale: float) -> None:
    for dtype in DTYPES:
        _check(_inputs(6, dtype, scale=scale))


def test_nan_stays_in_its_token() -> None:
    inputs = _inputs(12)
    clean = grouped_experts(*inputs)
    inputs[0][4, 7] = math.nan
    out = grouped_experts(*inputs)
    assert out[4].isnan().all()
    others = torch.arange(12, device=DEVICE) != 4
    assert torch.equal(out[others], clean[others])


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning", "ignore:invalid:RuntimeWarning")  # numpy's, interpreted
def test_an_infinite_activation_is_not_hidden() -> None:
    inputs = _inputs(3)
    inputs[0][1] = 1e30  # its square overflows
    out = grouped_experts(*inputs)
    assert not out[1].isfinite().all()
    assert out[0].isfinite().all()


def test_a_token_has_the_same_bits_alone_in_a_batch_and_from_run_to_run() -> None:
    hidden, chosen, weights, up, down = _inputs(20)
    whole = grouped_experts(hidden, chosen, weights, up, down, block_rows=16)
    assert torch.equal(whole, grouped_experts(hidden, chosen, weights, up, down, block_rows=16))
    for i in (0, 7, 19):
        row = slice(i, i + 1)
        alone = grouped_experts(hidden[row], chosen[row], weights[row], up, down, block_rows=16)
        # The interpreter's matrix product is numpy's, whose order of sums depends on shapes and alignment.
        torch.testing.assert_close(alone, whole[row], rtol=1e-6 if interpreted() else 0, atol=1e-6 if interpreted() else 0)


def test_rows_of_a_wider_tensor() -> None:
    hidden, chosen, weights, up, down = _inputs(5)
    wide = torch.cat([hidden, hidden], 1)[:, : hidden.shape[1]]
    assert torch.equal(grouped_experts(wide, chosen, weights, up, down), grouped_experts(hidden, chosen, weights, up, down))


def test_no_tokens() -> None:
    hidden, chosen, weights, up, down = _inputs(1)
    assert grouped_experts(hidden[:0], chosen[:0], weights[:0], up, down).shape == (0, 24)


@pytest.mark.parametrize("n", [1, 16, 100, 1000, 10000])
def test_rows_a_program_holds(n: int) -> None:
    rows = choose_rows(n, 6 * n, 128)
    assert 16 <= rows <= 128
    assert rows & (rows - 1) == 0
    assert rows <= max(16, 2 * n)
