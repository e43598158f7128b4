"""What a draft may cost, by what drafts earn."""

from __future__ import annotations

import dataclasses

import pytest

from twotower.engine.effort import CHOICES, MAX_REST, REST, TRY_EVERY, Effort, Times

TIMES = Times(token=1.0, commit=1.5, step=1.5)


def _run(effort: Effort, kept: dict[int, int], rounds: int, times: Times = TIMES) -> list[int]:
    """So many choices, of which each draft of n forwards keeps kept[n] tokens, and a rest of AR steps is one."""
    chosen = []
    for _ in range(rounds):
        steps = effort.choose()
        chosen.append(steps)
        if steps:
            effort.verified(kept[steps], times)
        else:
            while effort.resting:
                effort.stepped()
    return chosen


def test_one_forward_while_that_earns_the_most() -> None:
    chosen = _run(Effort(16), dict.fromkeys(CHOICES, 14), 8 * TRY_EVERY)
    assert chosen.count(1) >= 0.9 * len(chosen)


def test_more_forwards_where_they_earn_more() -> None:
    chosen = _run(Effort(16), {1: 4, 2: 12, 4: 13}, 6 * TRY_EVERY)
    assert chosen[-TRY_EVERY // 2 :] == [2] * (TRY_EVERY // 2)


def test_refused_drafts_give_way_to_ar_steps_for_longer_and_longer() -> None:
    effort, wasted, tokens, rests = Effort(16), 0.0, 0, []
    while tokens < 4 * MAX_REST:
        if effort.choose():
            effort.verified(1, TIMES)
            wasted += TIMES.round(1) - TIMES.token
            tokens += 1
        else:
            rest = 0
            while effort.resting:
                effort.stepped()
                rest += 1
            tokens += rest
            rests.append(rest)
        if tokens >= 2 * REST:
            assert wasted <= 0.15 * tokens
    assert rests[:3] == [REST, 2 * REST, 4 * REST]
    assert max(rests) <= MAX_REST


def test_drafts_that_earn_again_come_back() -> None:
    effort = Effort(16)
    while not effort.resting:
        effort.verified(1, TIMES)
    while effort.resting:
        assert effort.choose() == 0
        effort.stepped()
    assert _run(effort, dict.fromkeys(CHOICES, 16), 10) == [1] * 10


def test_what_a_request_fixes_stays() -> None:
    effort = Effort(16, fixed=3)
    for _ in range(50):
        assert effort.choose() == 3
        effort.verified(1, TIMES)


@pytest.mark.parametrize("fixed", [0, 3])
def test_given_up_is_for_good(fixed: int) -> None:
    effort = Effort(16, fixed)
    effort.give_up()
    for _ in range(10_000):
        effort.stepped()
    assert effort.choose() == 0


def test_bad_drafts_give_way_before_an_ar_step_was_measured() -> None:
    assert 0 in _run(Effort(16), dict.fromkeys(CHOICES, 1), 10, Times(commit=1.0, step=1.0))


def test_where_drafts_of_others_were_refused_new_sessions_begin_with_ar_steps_but_not_all() -> None:
    times = dataclasses.replace(TIMES, kept=1.0)
    begun = [Effort(16, times=times) for _ in range(100)]
    assert begun[0].resting
    assert 0 < sum(effort.resting for effort in begun) < 100
    assert not Effort(16, fixed=2, times=times).resting


def test_one_slow_forward_changes_little() -> None:
    times = Times()
    for seconds in (1.0, 1.0, 100.0):
        times.measured("step", seconds)
    assert times.step == pytest.approx(1.3)
