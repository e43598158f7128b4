"""The compiled CPU kernels against plain torch in fp32."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from twotower_kernels.cpu import experts as cpu
from twotower_kernels.cpu.build import load
from twotower_kernels.cpu.linear import linear
from twotower_kernels.experts import all_experts

pytestmark = pytest.mark.skipif(load() is None, reason="no AVX-512 BF16, or no compiler")


def _bf16(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).bfloat16()


def _case(
    n: int, total: int, top_k: int, width: int, size: int, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    experts = torch.rand(n, total, generator=draw).topk(top_k).indices if n else torch.empty(0, top_k, dtype=torch.int64)
    weights = torch.rand(n, top_k, generator=draw)
    up, down = _bf16(total, width, size, seed=seed + 1, scale=size**-0.5), _bf16(total, size, width, seed=seed + 2, scale=0.1)
    return _bf16(n, size, seed=seed + 3), experts, weights, up, down


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("n", "total", "top_k", "width", "size"),
    [
        (1, 8, 2, 32, 64),
        (16, 128, 6, 128, 192),
        (5, 4, 4, 17, 33),
        (64, 8, 2, 256, 192),
        (99, 8, 1, 16, 16),
        (0, 4, 2, 32, 32),
    ],
)
def test_experts(n: int, total: int, top_k: int, width: int, size: int, threads: int) -> None:
    hidden, experts, weights, up, down = _case(n, total, top_k, width, size)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        out = cpu.grouped_experts(hidden, experts, weights, up, down)
    finally:
        torch.set_num_threads(before)
    expected = all_experts(hidden.float(), experts, weights, up.float(), down.float())
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2 * float(expected.abs().max()) if n else 0.0)


def test_a_token_has_the_same_bits_whoever_is_beside_it() -> None:
    hidden, experts, weights, up, down = _case(40, 8, 2, 96, 80)
    together = cpu.grouped_experts(hidden, experts, weights, up, down)
    for rows in (slice(0, 1), slice(3, 5), slice(7, 38)):
        assert torch.equal(cpu.grouped_experts(hidden[rows], experts[rows], weights[rows], up, down), together[rows])


def test_hidden_rows_may_lie_apart() -> None:
    hidden, experts, weights, up, down = _case(6, 8, 2, 32, 48)
    wide = torch.cat([hidden, torch.full_like(hidden, torch.nan)], 1)[:, :48]
    assert torch.equal(
        cpu.grouped_experts(wide, experts, weights, up, down), cpu.grouped_experts(hidden, experts, weights, up, down)
    )


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_with_its_token(bad: float) -> None:
    hidden, experts, weights, up, down = _case(9, 8, 2, 32, 48)
    sound = cpu.grouped_experts(hidden, experts, weights, up, down)
    hidden[4, 7] = bad
    out = cpu.grouped_experts(hidden, experts, weights, up, down)
    assert not out[4].isfinite().any()
    others = [i for i in range(9) if i != 4]
    assert torch.equal(out[others], sound[others])


@pytest.mark.parametrize("rows", [1, 2, 3, 16, 31, 64, 65, 150])
@pytest.mark.parametrize(("outputs", "size"), [(16, 32), (100, 192), (777, 70), (17, 5)])
def test_linear(rows: int, outputs: int, size: int) -> None:
    x, weight = _bf16(rows, size, seed=1), _bf16(outputs, size, seed=2, scale=size**-0.5)
    out = linear(x, weight)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), x.float() @ weight.float().t(), rtol=1e-2, atol=1e-2)


def test_linear_with_a_bias() -> None:
    x, weight, bias = _bf16(5, 40, seed=1), _bf16(37, 40, seed=2), _bf16(37, seed=3)
    expected = x.float() @ weight.float().t() + bias.float()
    torch.testing.assert_close(linear(x, weight, bias).float(), expected, rtol=1e-2, atol=1e-2)


def test_linear_of_rows_that_lie_apart_and_of_more_axes() -> None:
    x, weight = _bf16(2, 8, 3 * 64, seed=1), _bf16(48, 64, seed=2)
    part = x[..., 64:128]
    assert torch.equal(linear(part, weight), linear(part.contiguous(), weight))
    assert linear(part, weight).shape == (2, 8, 48)


def test_linear_has_the_same_bits_whoever_is_beside() -> None:
    x, weight = _bf16(150, 96, seed=1), _bf16(50, 96, seed=2)
    assert torch.equal(linear(x[11:12], weight)[0], linear(x, weight)[11])
    assert torch.equal(linear(x[140:], weight), linear(x, weight)[140:])


def test_gradients_flow() -> None:
    x, weight = _bf16(4, 32, seed=1), _bf16(20, 32, seed=2).requires_grad_()
    linear(x, weight).float().sum().backward()
    assert weight.grad is not None
