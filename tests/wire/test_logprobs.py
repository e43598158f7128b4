"""Logprobs as messages: no bit is lost, and what does not fit is refused by name."""

from __future__ import annotations

import math

import pytest
import torch

from twotower.engine.logprobs import token_logprobs
from twotower.errors import Incompatible
from twotower.request import GenerationParams, TokenLogprob
from twotower.wire.logprobs import check_logprobs, logprobs_from_pb, logprobs_to_pb
from twotower.wire.params import params_from_pb, params_to_pb

GOOD = TokenLogprob(-0.5, ((3, -0.5), (7, -1.5)))


def test_there_and_back() -> None:
    logits = torch.randn(9, 40, generator=torch.Generator().manual_seed(0))
    for top in (0, 5):
        given = tuple(token_logprobs(logits, torch.arange(9), top))
        assert logprobs_from_pb(logprobs_to_pb(given)) == given


@pytest.mark.parametrize("logprobs", [None, 0, 5])
def test_none_and_zero_are_not_the_same(logprobs: int | None) -> None:
    params = GenerationParams(logprobs=logprobs)
    assert params_from_pb(params_to_pb(params)) == params


def test_what_fits() -> None:
    check_logprobs([GOOD] * 4, 4, 2, 10)
    check_logprobs([], 4, None, 10)
    check_logprobs([TokenLogprob(-0.5)] * 4, 4, 0, 10)


@pytest.mark.parametrize(
    ("logprobs", "top", "said"),
    [
        ([GOOD] * 3, 2, r"done\.logprobs: 3, where 4 are due"),
        ([], 2, r"done\.logprobs: 0, where 4 are due"),
        ([GOOD] * 4, None, r"done\.logprobs: 4, where 0 are due"),
        ([GOOD] * 4, 3, r"done\.logprobs\.top: 2 tokens at a place, where 3 are due"),
        ([GOOD] * 3 + [TokenLogprob(math.nan, GOOD.top)], 2, r"done\.logprobs: one is not finite"),
        ([GOOD] * 3 + [TokenLogprob(-1.0, ((3, -0.5), (7, -math.inf)))], 2, r"done\.logprobs: one is not finite"),
        ([GOOD] * 3 + [TokenLogprob(-1.0, ((3, -0.5), (10, -1.0)))], 2, r"done\.logprobs\.top: a token is outside"),
    ],
)
def test_what_does_not_fit_is_named(logprobs: list[TokenLogprob], top: int | None, said: str) -> None:
    with pytest.raises(Incompatible, match=f"^{said}"):
        check_logprobs(logprobs, 4, top, 10)
