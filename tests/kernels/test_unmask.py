"""Confidence unmasking against the plain text of model.md, row by row."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from twotower_kernels.unmask import draw, unmask

MASK = 3


def _reference(logits: Tensor, tokens: Tensor, masked: Tensor, gamma: float, steps_left: int) -> tuple[list[int], list[bool]]:
    logits = logits.clone()
    logits[:, MASK] = -math.inf
    confidence, predicted = logits.softmax(-1).max(-1)
    positions = [i for i in range(len(tokens)) if masked[i]]
    sure = sum(confidence[i].item() > gamma for i in positions)
    count = len(positions) if steps_left == 1 else min(len(positions), max(1, sure, math.ceil(len(positions) / steps_left)))
    ascending = sorted(positions, key=lambda i: confidence[i].item())  # stable
    chosen = ascending[len(positions) - count :]
    new = [int(predicted[i] if i in chosen else tokens[i]) for i in range(len(tokens))]
    return new, [bool(masked[i]) and i not in chosen for i in range(len(tokens))]


def _run(
    logits: Tensor, tokens: Tensor, masked: Tensor, gamma: Tensor, steps: Tensor, temperature: float = 0.0
) -> tuple[Tensor, ...]:
    batch, length, _ = logits.shape
    out = unmask(
        logits.clone(),
        tokens,
        masked,
        mask_id=MASK,
        gamma=gamma,
        steps_left=steps,
        temperature=torch.full((batch,), temperature),
        uniforms=torch.rand(batch, length, dtype=torch.float64, generator=torch.Generator().manual_seed(0)),
    )
    return out.tokens, out.masked, out.finite


@pytest.mark.parametrize("seed", range(8))
def test_rows_at_their_own_step_gamma_and_masks(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    batch, length, vocab = 7, 16, 11
    logits = torch.randn(batch, length, vocab, generator=g) * 4
    masked = torch.rand(batch, length, generator=g) < 0.6
    masked[:, 5] = True
    tokens = torch.where(masked, MASK, torch.randint(4, vocab, (batch, length), generator=g))
    gamma = torch.rand(batch, generator=g)
    steps = torch.randint(1, 17, (batch,), generator=g)
    new, left, finite = _run(logits, tokens, masked, gamma, steps)
    assert finite.all()
    for i in range(batch):
        expected = _reference(logits[i], tokens[i], masked[i], gamma[i].item(), int(steps[i]))
        assert (new[i].tolist(), left[i].tolist()) == expected


def test_the_last_step_commits_everything_and_equal_confidences_from_the_back() -> None:
    logits = torch.zeros(1, 4, 6)
    masked, tokens = torch.ones(1, 4, dtype=torch.bool), torch.full((1, 4), MASK)
    _, left, _ = _run(logits, tokens, masked, torch.tensor([1.0]), torch.tensor([1]))
    assert not left.any()
    _, left, _ = _run(logits, tokens, masked, torch.tensor([1.0]), torch.tensor([4]))
    assert left[0].tolist() == [True, True, True, False]


def test_the_mask_id_is_never_predicted() -> None:
    logits = torch.zeros(1, 4, 6)
    logits[..., MASK] = 50
    new, left, _ = _run(
        logits, torch.full((1, 4), MASK), torch.ones(1, 4, dtype=torch.bool), torch.tensor([0.0]), torch.tensor([1])
    )
    assert not left.any()
    assert (new != MASK).all()


def test_nan_fails_its_row_only() -> None:
    logits = torch.randn(3, 4, 6)
    logits[1, 2] = math.nan
    masked = torch.ones(3, 4, dtype=torch.bool)
    _, _, finite = _run(logits, torch.full((3, 4), MASK), masked, torch.full((3,), 0.5), torch.full((3,), 4))
    assert finite.tolist() == [True, False, True]


def test_draws_follow_the_distribution_and_do_not_mix_rows() -> None:
    logits = torch.tensor([0.1, 0.2, 0.7]).log().expand(20000, 3)
    u = torch.rand(20000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    drawn = draw(logits, torch.ones(20000), u)
    shares = torch.bincount(drawn, minlength=3) / 20000
    torch.testing.assert_close(shares, torch.tensor([0.1, 0.2, 0.7]), atol=0.015, rtol=0)
    half = draw(logits[:2], torch.tensor([0.0, 1.0]), torch.tensor([0.05, 0.05], dtype=torch.float64))
    assert half.tolist() == [2, 0]  # greedy, and the draw at 0.05
    cold = draw(logits, torch.full((20000,), 0.25), u)
    assert (cold == 2).float().mean() > 0.95


@pytest.mark.parametrize(
    ("top_k", "top_p", "expected"),
    [
        (0, 1.0, [0.1, 0.2, 0.3, 0.4]),
        (2, 1.0, [0, 0, 3 / 7, 4 / 7]),
        (1, 1.0, [0, 0, 0, 1]),
        (9, 1.0, [0.1, 0.2, 0.3, 0.4]),
        (0, 0.4, [0, 0, 0, 1]),
        (0, 0.41, [0, 0, 3 / 7, 4 / 7]),
        (0, 1e-9, [0, 0, 0, 1]),
        (3, 0.75, [0, 0, 3 / 7, 4 / 7]),  # of what top_k leaves: 0.75 of 0.9 is reached by 0.4 + 0.3
    ],
)
def test_draws_among_the_likeliest(top_k: int, top_p: float, expected: list[float]) -> None:
    n = 20000
    logits = torch.tensor([0.1, 0.2, 0.3, 0.4]).log().expand(n, 4)
    u = torch.rand(n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    drawn = draw(logits, torch.ones(n), u, torch.full((n,), top_k), torch.full((n,), top_p, dtype=torch.float64))
    torch.testing.assert_close(
        torch.bincount(drawn, minlength=4) / n, torch.tensor(expected, dtype=torch.float32), atol=0.015, rtol=0
    )


def test_a_row_that_draws_among_all_is_not_changed_by_one_that_does_not() -> None:
    logits = torch.randn(64, 50, generator=torch.Generator().manual_seed(0))
    u = torch.rand(64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    alone = draw(logits, torch.ones(64), u)
    top_k, top_p = torch.zeros(64, dtype=torch.int64), torch.ones(64, dtype=torch.float64)
    top_k[::2], top_p[::4] = 3, 0.5
    mixed = draw(logits, torch.ones(64), u, top_k, top_p)
    assert torch.equal(mixed[1::2], alone[1::2])
    assert not torch.equal(mixed, alone)


def test_a_draw_never_lands_on_what_is_excluded() -> None:
    logits = torch.tensor([[-math.inf, 0.0, 0.0, -math.inf]])
    for value in (0.0, 0.25, 0.5, 1.0 - 2**-53):
        assert draw(logits, torch.ones(1), torch.tensor([value], dtype=torch.float64)).item() in (1, 2)
