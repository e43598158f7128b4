"""Who waits for state memory."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from twotower.engine.waiting import WaitingLine
from twotower.request import Priority


def test_by_priority_then_by_arrival() -> None:
    line: WaitingLine[str] = WaitingLine()
    for name, priority in (("a", Priority.NORMAL), ("b", Priority.LOW), ("c", Priority.NORMAL), ("d", Priority.HIGH)):
        line.add(name, name, priority)
    assert list(line.admit(lambda name: True)) == ["d", "a", "c", "b"]
    assert len(line) == 0


def test_what_does_not_fit_holds_up_what_comes_later() -> None:
    line: WaitingLine[int] = WaitingLine()
    for name, size in (("large", 5), ("small", 1)):
        line.add(name, size)
    assert not list(line.admit(lambda size: size <= 2))
    assert line.leave("large") == 5
    assert list(line.admit(lambda size: size <= 2)) == [1]


def test_who_has_left_is_not_admitted_and_may_come_again() -> None:
    line: WaitingLine[str] = WaitingLine()
    line.add("a", "first")
    assert line.leave("a") == "first"
    assert line.leave("a") is None
    line.add("a", "again")
    assert list(line.admit(lambda item: True)) == ["again"]


@given(st.lists(st.tuples(st.sampled_from(list(Priority)), st.integers(1, 4)), max_size=30), st.integers(4, 8))
def test_nobody_is_lost_and_room_is_respected(arrivals: list[tuple[Priority, int]], room: int) -> None:
    line: WaitingLine[tuple[str, int]] = WaitingLine()
    for i, (priority, size) in enumerate(arrivals):
        line.add(str(i), (str(i), size), priority)
    admitted: list[str] = []
    while len(line):
        taken = 0
        for name, size in line.admit(lambda item: taken + item[1] <= room):  # noqa: B023  # asked at once
            taken += size
            assert taken <= room
            admitted.append(name)
        if not taken:
            pytest.fail("what fits alone is admitted")
    assert sorted(admitted, key=int) == [str(i) for i in range(len(arrivals))]
