"""Rates and means that forget."""

from __future__ import annotations

import pytest

from twotower.service.meters import MEMORY_S, Mean, Rate


def test_a_steady_rate_is_met_and_then_forgotten() -> None:
    rate = Rate()
    assert rate.per_s(0) == 0
    for tick in range(2000):
        rate.add(1, tick / 10)
    assert rate.per_s(200) == pytest.approx(10, rel=0.02)
    assert rate.per_s(200 + MEMORY_S) == pytest.approx(10 / 2.718, rel=0.02)
    assert rate.per_s(200 + 20 * MEMORY_S) < 1e-3


def test_a_mean_follows_what_comes() -> None:
    mean = Mean()
    assert mean.value == 0
    mean.add(4, 0, weight=3)
    mean.add(8, 0)
    assert mean.value == pytest.approx(5)
    for tick in range(100):
        mean.add(1, float(tick + 1))
    assert mean.value == pytest.approx(1, abs=0.01)
