"""The unmasking kernels against the plain torch form."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import pytest
import torch
from torch import Tensor

from twotower_kernels import unmask as plain
from twotower_kernels.unmask import Unmasked

pytest.importorskip("triton")

from twotower_kernels.triton.common import interpreted
from twotower_kernels.triton.unmask import unmask

pytestmark = pytest.mark.device

DEVICE = "cpu" if interpreted() else "cuda"
MASK = 3


@dataclass(frozen=True)
class Case:
    """A batch of blocks at some step."""

    logits: Tensor
    tokens: Tensor
    masked: Tensor
    gamma: Tensor
    steps_left: Tensor
    temperature: Tensor
    uniforms: Tensor


def _case(
    batch: int = 3,
    length: int = 16,
    vocab: int = 50,
    *,
    seed: int = 0,
    scale: float = 4.0,
    temperature: tuple[float, ...] = (0.0,),
) -> Case:
    g = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(batch, length, vocab, generator=g)
    masked = torch.rand(batch, length, generator=g) < 0.6
    masked[:, length // 2] = True
    tokens = torch.where(masked, MASK, torch.randint(4, vocab, (batch, length), generator=g))
    heat = torch.tensor([temperature[i % len(temperature)] for i in range(batch)])
    case = Case(
        logits,
        tokens,
        masked,
        torch.rand(batch, generator=g),
        torch.randint(1, 17, (batch,), generator=g),
        heat,
        torch.rand(batch, length, dtype=torch.float64, generator=g),
    )
    return Case(*(getattr(case, field.name).to(DEVICE) for field in fields(Case)))


def _run(case: Case, chunk: int | None = None) -> tuple[Unmasked, Unmasked]:
    """From the kernels and from torch, each on logits of its own."""
    rest = {name: getattr(case, name) for name in ("gamma", "steps_left", "temperature", "uniforms")}
    got = unmask(case.logits.clone(), case.tokens, case.masked, mask_id=MASK, **rest, chunk=chunk)
    return got, plain.unmask(case.logits.clone(), case.tokens, case.masked, mask_id=MASK, **rest)


def _check(case: Case, chunk: int | None = None) -> Unmasked:
    got, expected = _run(case, chunk)
    assert (got.tokens.dtype, got.masked.dtype, got.finite.dtype) == (torch.int64, torch.bool, torch.bool)
    assert torch.equal(got.finite, expected.finite)
    sound = expected.finite
    assert torch.equal(got.masked[sound], expected.masked[sound])
    assert torch.equal(got.tokens[sound], expected.tokens[sound])
    assert ((got.tokens >= 0) & (got.tokens < case.logits.shape[-1])).all()
    return got


@pytest.mark.parametrize("chunk", [None, 16])
@pytest.mark.parametrize("seed", range(2))
def test_rows_at_their_own_step_gamma_and_masks(seed: int, chunk: int | None) -> None:
    assert _check(_case(4, seed=seed), chunk).finite.all()


@pytest.mark.parametrize("chunk", [None, 16])
@pytest.mark.parametrize("seed", range(2))
def test_draws_beside_greedy_rows(seed: int, chunk: int | None) -> None:
    assert _check(_case(5, seed=seed, temperature=(0.0, 1.0, 0.1, -1.0, 3.0)), chunk).finite.all()


@pytest.mark.parametrize(("length", "vocab"), [(1, 5), (3, 17), (64, 33), (5, 16)])
def test_other_sizes(length: int, vocab: int) -> None:
    _check(_case(2, length, vocab, temperature=(0.0, 0.7)), 16)


def test_the_real_vocabulary() -> None:
    case = _case(2, 4, 131072, temperature=(0.0, 0.8))
    _check(case)


@pytest.mark.parametrize("seed", range(2))
def test_many_draws(seed: int) -> None:
    """The last step commits, and so shows, every draw."""
    case = _case(4, 16, 40, seed=seed, scale=1.0, temperature=(1.0, 0.3))
    case.masked.fill_(True)
    case.steps_left.fill_(1)
    got = _check(case, 16)
    assert not got.masked.any()
    assert (got.tokens != MASK).all()


@pytest.mark.parametrize("value", [0.0, 0.25, 0.5, 1 - 2**-53])
def test_a_draw_never_lands_on_what_is_excluded(value: float) -> None:
    case = _case(1, 4, 40, temperature=(1.0,))
    case.logits.fill_(-math.inf)
    case.logits[..., 17:19] = 0.0
    case.logits[..., MASK] = 5.0
    case.uniforms.fill_(value)
    case.masked.fill_(True)
    case.steps_left.fill_(1)
    got, _ = _run(case, 8)
    assert (got.tokens == (18 if value >= 0.5 else 17)).all()
    assert got.finite.all()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_equal_confidences_commit_from_the_back(temperature: float) -> None:
    case = _case(1, 8, 20, temperature=(temperature,))
    case.logits[:] = case.logits[:, :1]
    case.uniforms.fill_(0.5)
    case.masked.fill_(True)
    case.gamma.fill_(1.0)
    case.steps_left.fill_(3)
    got = _check(case, 8)
    assert got.masked[0].tolist() == [True] * 5 + [False] * 3


def test_of_equal_tokens_the_first() -> None:
    case = _case(1, 4, 40)
    case.logits.zero_()
    case.masked.fill_(True)
    case.steps_left.fill_(1)
    case.logits[0, 1, :5] = -1.0
    case.logits[0, 2, 8:] = 2.0
    case.logits[0, 3, [MASK, 9, 33]] = 3.0
    assert _check(case, 8).tokens[0].tolist() == [0, 5, 8, 9]


def test_certainty_reaches_a_gamma_just_below_one() -> None:
    """Confidences that round to 1 are equal, and count as sure for any gamma below 1 and for none of 1."""
    case = _case(2, 6, 40)
    case.logits.zero_()
    case.logits[..., 7] = torch.tensor([30.0, 40.0, 50.0, 60.0, 5.0, 4.0], device=DEVICE)
    case.masked.fill_(True)
    case.steps_left.fill_(6)
    case.gamma.copy_(torch.tensor([0.999, 1.0]))
    got = _check(case, 8)
    assert got.masked.tolist() == [[False] * 4 + [True] * 2, [True, True, True, False, True, True]]


@pytest.mark.parametrize("temperature", [0.0, 0.5])
@pytest.mark.parametrize(("scale", "shift"), [(1e-4, 0.0), (1e4, 0.0), (1.0, 1e4), (1.0, -1e4), (0.0, 0.0)])
def test_extreme_logits(scale: float, shift: float, temperature: float) -> None:
    case = _case(2, scale=scale, temperature=(temperature,))
    case.logits.add_(shift)
    case.logits[0, :, 16:32] = -math.inf  # a chunk with nothing in it
    assert _check(case, 16).finite.all()


def test_a_temperature_near_zero() -> None:
    case = _case(2, temperature=(1e-30,))
    got = _check(case, 16)
    greedy = Case(case.logits, case.tokens, case.masked, case.gamma, case.steps_left, 0 * case.temperature, case.uniforms)
    assert torch.equal(got.tokens, _run(greedy)[0].tokens)


@pytest.mark.filterwarnings(
    "ignore:invalid value:RuntimeWarning", "ignore:divide by zero:RuntimeWarning"
)  # numpy's, interpreted
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("what", ["nan", "inf", "nothing", "all nan"])
def test_a_row_that_is_not_finite_fails_alone(what: str, temperature: float) -> None:
    case = _case(3, temperature=(temperature,))
    case.masked[1, 2] = True
    if what == "nothing":
        case.logits[1, 2] = -math.inf
        case.logits[1, 2, MASK] = 0.0
    elif what == "all nan":
        case.logits[1] = math.nan
    else:
        case.logits[1, 2, 37] = float(what)
    got, expected = _run(case, 16)
    assert got.finite.tolist() == [True, False, True]
    assert torch.equal(got.tokens[::2], expected.tokens[::2])
    assert torch.equal(got.masked[::2], expected.masked[::2])
    assert ((got.tokens >= 0) & (got.tokens < 50)).all()


def test_what_is_not_finite_counts_at_masked_positions_only() -> None:
    case = _case(2, temperature=(0.0, 1.0))
    case.masked[:, 2] = False
    case.logits[:, 2, 30] = math.nan
    case.logits[..., MASK] = math.nan
    assert _check(case, 16).finite.all()


def test_a_slice_of_longer_logits_is_read_in_place() -> None:
    case = _case(2, 8)
    wide = torch.full((2, 9, 60), math.nan, device=DEVICE)
    wide[:, :8, :50] = case.logits
    rest = {name: getattr(case, name) for name in ("gamma", "steps_left", "temperature", "uniforms")}
    got = unmask(wide[:, :8, :50], case.tokens, case.masked, mask_id=MASK, **rest)
    expected = _run(case)[0]
    assert torch.equal(got.tokens, expected.tokens)
    assert torch.equal(got.masked, expected.masked)


def test_top_k_and_top_p_are_those_of_torch() -> None:
    case = _case(2, temperature=(1.0,))
    top_k = torch.tensor([1, 0], device=DEVICE)
    top_p = torch.tensor([1.0, 0.3], dtype=torch.float64, device=DEVICE)
    rest = {name: getattr(case, name) for name in ("gamma", "steps_left", "temperature", "uniforms")}
    rest |= {"mask_id": MASK, "top_k": top_k, "top_p": top_p}
    got = unmask(case.logits.clone(), case.tokens, case.masked, **rest)
    expected = plain.unmask(case.logits.clone(), case.tokens, case.masked, **rest)
    assert torch.equal(got.tokens, expected.tokens)
    assert torch.equal(got.masked, expected.masked)


def test_a_batch_without_rows() -> None:
    got, _ = _run(Case(*(getattr(_case(1), name)[:0] for name in (field.name for field in fields(Case)))))
    assert got.tokens.shape == (0, 16)
    assert got.finite.shape == (0,)
