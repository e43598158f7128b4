"""The router kernel against the plain torch form."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from twotower_kernels import experts as plain

pytest.importorskip("triton")

from twotower_kernels.triton.common import interpreted
from twotower_kernels.triton.router import route

pytestmark = pytest.mark.device

DEVICE = "cpu" if interpreted() else "cuda"


def _inputs(
    n: int,
    dtype: torch.dtype = torch.float32,
    *,
    experts: int = 16,
    hidden: int = 40,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(n + experts)
    x = scale * torch.randn(n, hidden, generator=g) / math.sqrt(hidden)
    weight, correction = torch.randn(experts, hidden, generator=g), torch.randn(experts, generator=g)
    return x.to(DEVICE, dtype), weight.to(DEVICE, dtype), correction.to(DEVICE)


def _check(
    inputs: tuple[Tensor, Tensor, Tensor],
    *,
    top_k: int = 3,
    groups: int = 1,
    top_groups: int = 1,
    normalize: bool = True,
    scale: float = 2.3,
    block_tokens: int | None = None,
    library: bool | None = None,
) -> None:
    rule: dict[str, Any] = {"top_k": top_k, "groups": groups, "top_groups": top_groups, "normalize": normalize, "scale": scale}
    experts, weights = route(*inputs, **rule, block_tokens=block_tokens, library=library)
    expected, expected_weights = plain.route(*inputs, **rule)
    assert experts.dtype is torch.int64
    assert weights.dtype is torch.float32
    assert torch.equal(experts, expected)
    torch.testing.assert_close(weights, expected_weights, rtol=2e-7, atol=0)  # the last bit of fp32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [1, 5, 33, 80])
def test_without_groups(n: int, dtype: torch.dtype) -> None:
    _check(_inputs(n, dtype))
    _check(_inputs(n, dtype), normalize=False, block_tokens=4)
    _check(_inputs(n, dtype), library=True)
    _check(_inputs(n, dtype), library=False)


def test_weights_in_fp64_are_read_as_they_are() -> None:
    x, weight, correction = _inputs(5)
    wide = weight.double() * (1 + 2.0**-40)
    _check((x, wide, correction))
    _check((x.bfloat16(), wide, correction))


@pytest.mark.parametrize("block_tokens", [1, 4])
@pytest.mark.parametrize(
    ("experts", "groups", "top_groups", "top_k"),
    [(16, 4, 2, 3), (16, 8, 1, 2), (15, 3, 2, 4), (16, 16, 5, 5), (12, 2, 1, 6), (16, 4, 4, 16)],
)
def test_groups(experts: int, groups: int, top_groups: int, top_k: int, block_tokens: int) -> None:
    inputs = _inputs(9, experts=experts)
    # Positive choices: what is excluded has choice 0, and among those torch takes any.
    inputs[2].abs_()
    _check(inputs, groups=groups, top_groups=top_groups, top_k=top_k, block_tokens=block_tokens)


@pytest.mark.parametrize(("experts", "hidden", "top_k"), [(1, 7, 1), (3, 1, 2), (20, 65, 1), (10, 129, 10)])
def test_numbers_that_are_no_powers_of_two(experts: int, hidden: int, top_k: int) -> None:
    _check(_inputs(6, experts=experts, hidden=hidden), top_k=top_k)


@pytest.mark.parametrize("n", [1, 2, 16])
def test_the_real_size(n: int) -> None:
    _check(_inputs(n, torch.bfloat16, experts=128, hidden=2688), top_k=6, scale=2.5)


@pytest.mark.parametrize("scale", [1e-6, 1e2, 1e4])
def test_extreme_logits(scale: float) -> None:
    _check(_inputs(12, scale=scale))  # in the end scores of 0 and 1, told apart by the correction


def test_scores_too_small_to_normalize() -> None:
    """All logits are about -50 to -100: the sum of the scores is below the 1e-20 it is kept away from 0 with."""
    hidden, weight, correction = _inputs(4)
    _check((-hidden.abs(), 40 * weight.abs(), correction))


def test_logits_are_fp64() -> None:
    """Two experts that fp32 sums cannot tell apart."""
    hidden = torch.ones(1, 3, device=DEVICE)
    weight = torch.tensor([[1e8, 1.0, -1e8], [1e8, 2.0, -1e8], [1e8, 0.5, -1e8]], device=DEVICE)
    zeros = torch.zeros(3, device=DEVICE)
    _check((hidden, weight, zeros), top_k=2)
    experts, _ = route(hidden, weight, zeros, top_k=3, groups=1, top_groups=1, normalize=True, scale=1.0)
    assert experts.tolist() == [[1, 0, 2]]


@pytest.mark.parametrize("groups", [1, 4])
def test_of_equals_the_first(groups: int) -> None:
    hidden, weight, correction = _inputs(3)
    same = weight[:1].expand(16, -1)
    top_groups = 2 if groups > 1 else 1
    experts, weights = route(
        hidden, same, torch.zeros_like(correction), top_k=5, groups=groups, top_groups=top_groups, normalize=True, scale=1.0
    )
    assert experts.tolist() == [[0, 1, 2, 3, 4]] * 3
    torch.testing.assert_close(weights, torch.full_like(weights, 0.2))


@pytest.mark.parametrize("correction", [5.0, -5.0])
def test_more_choices_than_the_groups_allow(correction: float) -> None:
    """Excluded experts have choice 0: behind those with positive ones, in front of those with negative ones."""
    hidden, weight, _ = _inputs(4, experts=8)
    shift = torch.full((8,), correction, device=DEVICE)
    experts, weights = route(hidden, weight, shift, top_k=4, groups=4, top_groups=1, normalize=False, scale=1.0)
    scores = (hidden.double() @ weight.double().t()).sigmoid()
    torch.testing.assert_close(weights, scores.gather(1, experts).float(), rtol=2e-7, atol=0)
    group = scores.unflatten(1, (4, 2)).sum(-1).argmax(-1)
    for best, row, score in zip(group.tolist(), experts.tolist(), scores.tolist(), strict=True):
        inside = sorted((2 * best, 2 * best + 1), key=lambda e: -score[e])
        outside = [e for e in range(8) if e not in inside]
        assert row == ([*inside, *outside][:4] if correction > 0 else outside[:4])


def test_nan_gives_valid_experts_and_stays_in_its_row() -> None:
    hidden, weight, correction = _inputs(5)
    for groups in (1, 4):
        rule: dict[str, Any] = {"top_k": 3, "groups": groups, "top_groups": min(2, groups), "normalize": True, "scale": 1.0}
        clean = route(hidden, weight, correction, **rule, block_tokens=4)
        bad = hidden.clone()
        bad[1, 3] = math.nan
        experts, weights = route(bad, weight, correction, **rule, block_tokens=4)
        assert weights[1].isnan().all()
        assert sorted(set(experts[1].tolist())) == [0, 1, 2]
        others = torch.arange(5, device=DEVICE) != 1
        assert torch.equal(experts[others], clean[0][others])
        assert torch.equal(weights[others], clean[1][others])


def test_no_tokens() -> None:
    hidden, weight, correction = _inputs(1)
    experts, weights = route(hidden[:0], weight, correction, top_k=3, groups=1, top_groups=1, normalize=True, scale=1.0)
    assert experts.shape == weights.shape == (0, 3)
