"""Whose fault a failing forward is."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from twotower.engine.isolation import MAX_FAILURES, Isolation


@given(st.integers(1, 33), st.data())
def test_those_that_fail_alone_are_found_and_all_others_run_once(count: int, data: st.DataObject) -> None:
    bad = data.draw(st.sets(st.integers(0, count - 1), max_size=MAX_FAILURES - 1))
    ran: list[int] = []

    def forward(items: Sequence[int]) -> None:
        if bad & set(items):
            raise RuntimeError(f"{sorted(bad & set(items))}")
        ran.extend(items)

    failed = Isolation[int]("forward", str).run(range(count), forward)
    assert [item for item, _ in failed] == sorted(bad)
    assert sorted(ran) == [item for item in range(count) if item not in bad]


def test_session_after_session_is_the_devices_fault() -> None:
    def forward(items: Sequence[int]) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal"):
        Isolation[int]("forward", str).run(range(MAX_FAILURES), forward)


def test_the_same_session_again_and_again_is_not() -> None:
    isolation: Isolation[int] = Isolation("forward", str)

    def forward(items: Sequence[int]) -> None:
        raise RuntimeError("no")

    for _ in range(3 * MAX_FAILURES):
        assert len(isolation.run([7], forward)) == 1


def test_a_success_between_clears_the_device() -> None:
    isolation: Isolation[int] = Isolation("forward", str)

    def forward(items: Sequence[int]) -> None:
        if items[0] >= 0:
            raise RuntimeError("no")

    for i in range(3 * MAX_FAILURES):
        isolation.run([i], forward)
        isolation.run([-1], forward)
