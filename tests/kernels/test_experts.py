"""Routing against the plain text of docs/model.md, and every form of the experts against a loop."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from twotower_kernels.experts import (
    active_experts,
    all_experts,
    dense_experts,
    gathered_experts,
    grouped_experts,
    relu2,
    route,
    wide_down,
)


def _loop(hidden: Tensor, experts: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> Tensor:
    out = torch.zeros(hidden.shape, dtype=torch.float32)
    for i in range(hidden.shape[0]):
        for e, w in zip(experts[i].tolist(), weights[i].tolist(), strict=True):
            out[i] += w * (down[e].float() @ relu2(up[e].float() @ hidden[i].float()))
    return out


def _inputs(n: int, seed: int = 0) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    e, i, h, k = 8, 16, 24, 3
    hidden = torch.randn(n, h, generator=g)
    experts = torch.stack([torch.randperm(e, generator=g)[:k] for _ in range(n)])
    weights = torch.rand(n, k, generator=g)
    return hidden, experts, weights, torch.randn(e, i, h, generator=g) * 0.2, torch.randn(e, h, i, generator=g) * 0.2


@pytest.mark.parametrize("n", [1, 2, 16, 65])
def test_forms_agree_with_a_loop(n: int) -> None:
    inputs = _inputs(n)
    expected = _loop(*inputs)
    torch.testing.assert_close(grouped_experts(*inputs), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(all_experts(*inputs), expected, rtol=1e-4, atol=1e-4)
    if n == 1:
        torch.testing.assert_close(active_experts(*inputs), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("n", [1, 2, 16, 64])
def test_the_dense_form_in_bf16_is_as_close_as_the_grouped(n: int) -> None:
    hidden, experts, weights, up, down = _inputs(n)
    exact = _loop(hidden, experts, weights, up, down)
    low = (hidden.bfloat16(), experts, weights, up.bfloat16())
    wide = wide_down(down.bfloat16(), top_k=3)
    assert wide is not None
    error = (dense_experts(*low, wide) - exact).abs().max()
    assert error < 2e-2 * exact.abs().max()
    assert error < 2 * (grouped_experts(*low, down.bfloat16()) - exact).abs().max()


def test_the_dense_form_is_not_taken_where_it_does_not_pay() -> None:
    assert wide_down(torch.zeros(8, 24, 16), top_k=3) is None  # fp32
    assert wide_down(torch.zeros(32, 24, 16, dtype=torch.bfloat16), top_k=3) is None  # too many experts


def test_one_token_in_a_compiled_graph() -> None:
    inputs = _inputs(1)
    torch.testing.assert_close(gathered_experts(*inputs), _loop(*inputs), rtol=1e-4, atol=1e-4)


def test_experts_without_tokens() -> None:
    hidden, experts, weights, up, down = _inputs(16)
    experts = torch.tensor([[7, 0, 3]]).expand(16, 3).contiguous()  # five experts have nothing to do
    torch.testing.assert_close(
        grouped_experts(hidden, experts, weights, up, down), _loop(hidden, experts, weights, up, down), rtol=1e-4, atol=1e-4
    )


def test_bf16_close_to_fp32() -> None:
    hidden, experts, weights, up, down = _inputs(16)
    got = grouped_experts(hidden.bfloat16(), experts, weights, up.bfloat16(), down.bfloat16())
    expected = _loop(hidden, experts, weights, up, down)
    assert (got - expected).abs().max() < 2e-2 * expected.abs().max()


def test_a_token_does_not_depend_on_its_neighbours_choice() -> None:
    hidden, experts, weights, up, down = _inputs(16)
    alone = torch.cat([grouped_experts(hidden[i : i + 1], experts[i : i + 1], weights[i : i + 1], up, down) for i in range(16)])
    torch.testing.assert_close(alone, grouped_experts(hidden, experts, weights, up, down), rtol=1e-5, atol=1e-6)


def test_route_with_correction_and_groups() -> None:
    g = torch.Generator().manual_seed(1)
    hidden, weight = torch.randn(5, 24, generator=g), torch.randn(8, 24, generator=g)
    correction = torch.randn(8, generator=g)
    experts, weights = route(hidden, weight, correction, top_k=2, groups=4, top_groups=2, normalize=True, scale=2.5)
    for i in range(5):
        scores = torch.sigmoid(weight.double() @ hidden[i].double())
        choice = scores + correction
        sums = [sum(sorted(choice[2 * j : 2 * j + 2].tolist(), reverse=True)) for j in range(4)]
        best = sorted(range(4), key=lambda j: -sums[j])[:2]
        limited = [choice[e].item() if e // 2 in best else 0.0 for e in range(8)]
        chosen = sorted(range(8), key=lambda e: -limited[e])[:2]
        assert experts[i].tolist() == chosen
        picked = scores[chosen]
        torch.testing.assert_close(weights[i], (picked / (picked.sum() + 1e-20) * 2.5).float())
