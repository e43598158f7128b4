"""Short storms; `make test-faults` runs them all, for as long as one likes."""

from __future__ import annotations

import asyncio
import sys

import pytest

from tests.faults import strikes
from tests.faults.asks import alike, mixed
from tests.faults.scenarios import precision, scenarios
from tests.faults.storm import Scenario, weather
from tests.support.processes import up
from twotower.cli.options import DEFAULT_CHECKPOINT

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


LEAVING = Scenario("leaving", "", alike(12), ("--max-sessions", 8), clients=16, leave=0.6, room=8)
KILL = Scenario("kill", "", mixed(16), clients=8, strike=strikes.kill((*strikes.TOWERS, "redis"), every_s=1.5))


@pytest.mark.parametrize("scenario", [LEAVING, KILL], ids=lambda scenario: scenario.name)
def test_a_short_storm(scenario: Scenario) -> None:
    with up(DEFAULT_CHECKPOINT, *scenario.options, *precision()) as stack:
        report = asyncio.run(weather(scenario, stack, 5.0, lambda line: None))
        report.exit_status = stack.terminate()
    assert not report.problems, "\n".join((*report.lines(), *stack.log[-20:]))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["stop", "stop-watched", "redis-stop", "equal-texts"])
def test_a_longer_storm(name: str) -> None:
    scenario = scenarios()[name]
    with up(DEFAULT_CHECKPOINT, *scenario.options, *precision()) as running:
        report = asyncio.run(weather(scenario, running, 45.0, lambda line: None))
        report.exit_status = running.terminate()
    assert not report.problems, "\n".join(report.lines())
