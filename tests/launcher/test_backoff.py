"""How long a service waits before it is started again."""

from __future__ import annotations

from twotower.launcher.backoff import Backoff


def test_the_first_end_waits_for_nothing_and_the_next_ones_double_up_to_a_bound() -> None:
    backoff = Backoff(first_s=0.5, max_s=30, stable_s=10)
    assert [backoff.ended(1.0) for _ in range(9)] == [0, 0.5, 1, 2, 4, 8, 16, 30, 30]


def test_a_stable_time_is_a_new_start() -> None:
    backoff = Backoff(first_s=0.5, max_s=30, stable_s=10)
    assert [backoff.ended(s) for s in (0.0, 9.9, 0.0, 10.0, 3.0)] == [0, 0.5, 1, 0, 0.5]
    assert backoff.ends == 2


def test_the_bound_holds_for_ever() -> None:
    backoff = Backoff(max_s=30)
    assert {backoff.ended(0.0) for _ in range(3000)} >= {0.0, 30.0}
    assert backoff.ended(0.0) == 30.0
