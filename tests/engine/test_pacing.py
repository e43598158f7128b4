"""How towers share cores: merging, credit, and nothing at all where there are cores to spare."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from twotower.engine.pacing import (
    ARRIVE_S,
    CREDIT_S,
    CROWD_S,
    GATHER_S,
    MERGE_S,
    ContextPacing,
    Load,
    Outbound,
    Pacing,
    SharedPacing,
)
from twotower.engine.turns import Turns


class _Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def turns(tmp_path: Path) -> Iterator[Turns]:
    (tmp_path / "turns").touch()
    turns = Turns(tmp_path / "turns")
    yield turns
    turns.close()


def test_with_cores_to_spare_nothing_waits() -> None:
    pacing = Pacing()
    assert pacing.patience(Load()) is None
    assert pacing.patience(Load(commits=1, elsewhere=50)) == 0
    assert pacing.patience(Load(others=1)) == 0


def test_a_turn_is_an_iteration(turns: Turns) -> None:
    pacing = SharedPacing(turns)
    pacing.begin()
    assert turns._held
    pacing.end(Load(others=3))
    assert not turns._held


def test_a_few_blocks_wait_for_more_within_bounds(turns: Turns) -> None:
    clock = _Clock()
    pacing = ContextPacing(turns, Outbound(), clock)
    few = Load(commits=2, elsewhere=10)
    assert pacing.patience(few) == pytest.approx(MERGE_S)
    clock.now += 0.2
    assert pacing.patience(Load(commits=3, elsewhere=9)) == pytest.approx(MERGE_S - 0.2)
    assert pacing.patience(Load(commits=5, elsewhere=7)) == 0
    assert pacing.patience(few) == pytest.approx(MERGE_S)
    clock.now += MERGE_S
    assert pacing.patience(few) == 0


def test_prompts_and_tokens_are_not_held_up_by_blocks_that_wait(turns: Turns) -> None:
    pacing = ContextPacing(turns, Outbound(), _Clock())
    assert pacing.patience(Load(commits=1, others=1, elsewhere=10)) == 0
    assert pacing.patience(Load(commits=1, prompts=1, elsewhere=10)) == 0


def test_prompts_that_come_together_are_read_together(turns: Turns) -> None:
    clock = _Clock()
    pacing = ContextPacing(turns, Outbound(), clock)
    assert pacing.patience(Load(prompts=1)) == pytest.approx(GATHER_S)
    clock.now += GATHER_S / 2
    assert pacing.patience(Load(prompts=2)) == pytest.approx(GATHER_S)
    clock.now += GATHER_S / 2
    assert pacing.patience(Load(prompts=2)) == pytest.approx(GATHER_S / 2)
    clock.now += GATHER_S
    assert pacing.patience(Load(prompts=2)) == 0
    pacing.begin()
    pacing.end(Load(prompts=1))  # what is left of them is read at once
    assert pacing.patience(Load(prompts=1)) == 0
    pacing.end(Load())
    for prompts in range(1, 20):  # an endless stream of them does not hold up the first for ever
        if pacing.patience(Load(prompts=prompts)) == pytest.approx(0):
            break
        clock.now += 0.9 * GATHER_S
    assert prompts == 6
    assert pacing.patience(Load(prompts=1, others=1)) == 0


def test_a_turn_goes_on_while_there_is_credit_and_more_to_do(turns: Turns) -> None:
    clock = _Clock()
    pacing = ContextPacing(turns, Outbound(), clock)
    pacing.begin()
    clock.now += 0.4
    pacing.end(Load(others=1))
    assert turns._held
    pacing.begin()
    clock.now += CREDIT_S
    pacing.end(Load(others=1))
    assert not turns._held
    # It had 1.4 s; others have had 0.1 s since: nothing is left of its credit.
    clock.now += 0.1
    pacing.begin()
    pacing.end(Load(others=1))
    assert not turns._held
    # In the long run it is owed what the others have had.
    clock.now += 0.9
    pacing.begin()
    clock.now += 0.3
    pacing.end(Load(others=1))
    assert turns._held


def test_who_is_alone_waits_for_nobody(turns: Turns) -> None:
    clock, outbound = _Clock(), Outbound()
    pacing = ContextPacing(turns, outbound, clock)
    assert pacing.patience(Load(sessions=2, elsewhere=2)) is None  # so there was company
    clock.now += CROWD_S / 2
    assert pacing.patience(Load(prompts=1, sessions=1)) == pytest.approx(GATHER_S)
    clock.now += CROWD_S
    assert pacing.patience(Load()) is None
    assert pacing.patience(Load(prompts=1, sessions=1)) == 0
    pacing.begin()
    outbound.on_way = 1
    pacing.end(Load(sessions=1))  # by the clock that stands still, at once
    assert not turns._held
    assert pacing.patience(Load(prompts=2, sessions=2)) == pytest.approx(GATHER_S)


def test_a_turn_ends_when_what_it_made_has_arrived(turns: Turns) -> None:
    clock, outbound = _Clock(), Outbound()
    steps = [lambda: None, lambda: setattr(outbound, "taken", 1), lambda: setattr(outbound, "on_way", 0)]

    def sleep(seconds: float) -> None:
        assert turns._held
        clock.now += seconds
        if steps:
            steps.pop(0)()

    pacing = ContextPacing(turns, outbound, clock, sleep)
    pacing.begin()
    outbound.delivered, outbound.on_way = 1, 2
    pacing.end(Load())
    assert not steps
    assert not turns._held
    pacing.begin()
    outbound.on_way = 1  # and never arrives
    began = clock.now
    pacing.end(Load())
    assert not turns._held
    assert ARRIVE_S <= clock.now - began < 2 * ARRIVE_S


@pytest.mark.parametrize("load", [Load(), Load(commits=1, elsewhere=8)])
def test_a_turn_ends_when_nothing_or_little_is_left(turns: Turns, load: Load) -> None:
    pacing = ContextPacing(turns, Outbound(), _Clock())
    pacing.begin()
    pacing.end(load)
    assert not turns._held


def test_whoever_waits_or_ends_has_no_turn(turns: Turns) -> None:
    pacing = ContextPacing(turns, Outbound(), _Clock())
    pacing.begin()
    pacing.end(Load(others=1))
    assert turns._held
    assert pacing.patience(Load()) is None
    assert not turns._held
    pacing.begin()
    pacing.close()
    assert not turns._held
