"""Norms, routing and unmasking on a CPU against plain torch."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from twotower_kernels import experts, norms, unmask
from twotower_kernels import linear as plain_linear
from twotower_kernels.cpu import norms as cpu_norms
from twotower_kernels.cpu import router as cpu_router
from twotower_kernels.cpu import unmask as cpu_unmask
from twotower_kernels.cpu.build import load
from twotower_kernels.cpu.linear import linear
from twotower_kernels.norms import Order

pytestmark = pytest.mark.skipif(load() is None, reason="no AVX-512 BF16, or no compiler")


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


@pytest.mark.parametrize("size", [1, 15, 16, 100, 768])
@pytest.mark.parametrize("order", ["modulate_first", "norm_first"])
@pytest.mark.parametrize("modulated", [True, False])
def test_norms(size: int, order: Order, modulated: bool) -> None:
    h, x, weight = draw(3, 5, size).bfloat16(), draw(3, 5, size, seed=1).bfloat16(), draw(size)
    shared = draw(3, 4, 3, 1, size).bfloat16()  # as the tower cuts them out: rows lie apart
    shift, scale, gate = (shared[:, 1, j] for j in range(3)) if modulated else (None, None, None)
    expected = norms.modulated_norm(h, weight, 1e-5, shift, scale, order=order)
    torch.testing.assert_close(
        cpu_norms.modulated_norm(h, weight, 1e-5, shift, scale, order=order), expected, rtol=1e-2, atol=1e-2
    )
    added, out = cpu_norms.add_modulated_norm(h, x, gate, weight, 1e-5, shift, scale, order=order)
    sum_expected, expected = norms.add_modulated_norm(h, x, gate, weight, 1e-5, shift, scale, order=order)
    torch.testing.assert_close(added, sum_expected, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2)
    alone = cpu_norms.add_modulated_norm(
        *(h[1:2], x[1:2], None if gate is None else gate[1:2], weight, 1e-5),
        *(None if t is None else t[1:2] for t in (shift, scale)),
        order=order,
    )
    assert torch.equal(alone[1][0], out[1])


@pytest.mark.parametrize("n", [0, 1, 3, 4, 50])
@pytest.mark.parametrize(("total", "top_k"), [(8, 2), (128, 6), (8, 8)])
@pytest.mark.parametrize("normalize", [True, False])
def test_routes(n: int, total: int, top_k: int, normalize: bool) -> None:
    hidden, weight, correction = draw(n, 64).bfloat16(), draw(total, 64).double() * 0.2, draw(total) * 0.3
    limits = {"top_k": top_k, "groups": 1, "top_groups": 1}
    chosen, weights = cpu_router.route(hidden, weight, correction, **limits, normalize=normalize, scale=2.5)
    expected, expected_weights = experts.route(hidden, weight, correction, **limits, normalize=normalize, scale=2.5)
    assert torch.equal(chosen, expected)
    torch.testing.assert_close(weights, expected_weights, rtol=1e-6, atol=1e-7)


def test_a_route_of_extreme_logits() -> None:
    hidden = torch.tensor([[3e4] * 8, [-3e4] * 8, [math.nan] * 8]).bfloat16()
    weight = torch.linspace(-1, 1, 64).reshape(8, 8).double()
    limits = {"top_k": 3, "groups": 1, "top_groups": 1}
    chosen, weights = cpu_router.route(hidden, weight, torch.zeros(8), **limits, normalize=True, scale=1.0)
    assert weights[:2].isfinite().all()
    assert weights[2].isnan().all()
    assert ((chosen >= 0) & (chosen < 8)).all()


def arguments(batch: int, length: int, vocab: int, temperature: float) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
    g = torch.Generator().manual_seed(vocab)
    masked = torch.rand(batch, length, generator=g) < 0.7
    masked[:, 0] = True
    options: dict[str, Any] = {
        "mask_id": 3,
        "gamma": torch.rand(batch, generator=g),
        "steps_left": torch.randint(1, 9, (batch,), generator=g),
        "temperature": torch.tensor([temperature if i % 2 else 0.0 for i in range(batch)]),
        "uniforms": torch.rand(batch, length, dtype=torch.float64, generator=g),
    }
    logits = torch.randn(batch, length, vocab, generator=g) * 3
    return logits, torch.where(masked, 3, 5), masked, options


@pytest.mark.parametrize("vocab", [5, 16, 131, 4096])
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_unmasking(vocab: int, temperature: float) -> None:
    logits, tokens, masked, options = arguments(6, 16, vocab, temperature)
    got = cpu_unmask.unmask(logits.clone(), tokens, masked, **options)
    expected = unmask.unmask(logits.clone(), tokens, masked, **options)
    assert torch.equal(got.masked, expected.masked)
    assert torch.equal(got.tokens, expected.tokens)
    assert got.finite.all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_told(bad: float) -> None:
    logits, tokens, masked, options = arguments(3, 8, 40, 0.0)
    logits[1, 0, 17] = bad
    assert cpu_unmask.unmask(logits.clone(), tokens, masked, **options).finite.tolist() == [True, False, True]
    masked[1] = False
    masked[1, 1] = True
    assert cpu_unmask.unmask(logits.clone(), tokens, masked, **options).finite.all()  # no one asks for that position


def test_equal_logits_are_the_first_tokens() -> None:
    logits = torch.zeros(1, 2, 33)
    logits[0, 1, 20:] = 1
    predicted, confidence = cpu_unmask.predict(
        logits[0], torch.tensor([True, True]), torch.zeros(2), torch.zeros(2, dtype=torch.float64), None, None
    )
    assert predicted.tolist() == [0, 20]
    torch.testing.assert_close(confidence, logits[0].softmax(-1).max(-1).values)


@pytest.mark.parametrize("rows", [1, 5, 70])
def test_what_goes_with_a_product(rows: int) -> None:
    x, weight, add = draw(rows, 96).bfloat16(), draw(50, 96).bfloat16() * 0.1, draw(rows, 50)
    for options in ({"relu2": True}, {"add": add}, {"wide": True}, {"add": add, "relu2": True, "wide": True}):
        got, expected = linear(x, weight, **options), plain_linear.linear(x.float(), weight.float(), **options)
        assert got.dtype is (torch.float32 if "wide" in options else torch.bfloat16)
        torch.testing.assert_close(got.float(), expected, rtol=1e-2, atol=1e-2)
    assert torch.equal(linear(x, weight, wide=True), linear(x, weight).float())
