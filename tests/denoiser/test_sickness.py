"""Which blocks make a denoiser look sick, and which say nothing."""

from __future__ import annotations

import dataclasses

from twotower.denoiser.sickness import BLOCKS, NOT_FINITE_S, FinishedBlock, Sickness

HEALTHY = FinishedBlock(tokens=16, forwards=9, steps=16, gamma=0.8, repeats=False)
UNSURE = dataclasses.replace(HEALTHY, forwards=16)


def after(*blocks: FinishedBlock) -> str:
    sickness = Sickness()
    for block in blocks:
        sickness.add(block)
    return sickness.why(0.0)


def test_tokens_a_forward_near_one() -> None:
    assert after(*[HEALTHY] * 200) == ""
    assert after(*[UNSURE] * BLOCKS) == "tokens_per_forward, out_of_steps"
    assert after(*[UNSURE] * (BLOCKS - 1)) == ""  # too few to say
    assert after(*[UNSURE] * 200, *[HEALTHY] * BLOCKS) == ""  # it has recovered


def test_blocks_that_take_a_forward_a_token_by_request_say_nothing() -> None:
    assert after(*[dataclasses.replace(UNSURE, gamma=1.0)] * 200) == ""
    assert after(*[dataclasses.replace(UNSURE, tokens=1, forwards=1, steps=1)] * 200) == ""
    assert after(*[dataclasses.replace(UNSURE, draft=True)] * 200) == ""


def test_few_steps_that_all_run_out() -> None:
    """Four tokens a forward look healthy; that every block is committed by its steps' end does not."""
    four = dataclasses.replace(HEALTHY, forwards=4, steps=4)
    assert after(*[four] * BLOCKS) == "out_of_steps"
    assert after(*[four, dataclasses.replace(four, forwards=3)] * BLOCKS) == ""


def test_repeats() -> None:
    again = dataclasses.replace(HEALTHY, repeats=True)
    assert after(*[HEALTHY, again] * BLOCKS) == "repeats"
    assert after(*[HEALTHY, HEALTHY, again] * BLOCKS) == ""


def test_logits_that_are_not_finite_are_remembered_for_a_while() -> None:
    sickness = Sickness()
    sickness.not_finite(100.0)
    assert sickness.why(100.0 + NOT_FINITE_S - 1) == "not_finite"
    assert sickness.why(100.0 + NOT_FINITE_S + 1) == ""
