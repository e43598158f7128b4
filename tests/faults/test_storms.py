"""Short storms; `make test-faults` runs them all, for as long as one likes."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator

import pytest

from tests.faults import strikes
from tests.faults.asks import alike, mixed
from tests.faults.scenarios import precision, scenarios
from tests.faults.storm import Scenario, weather
from tests.support.processes import Up, up
from twotower.cli.options import DEFAULT_CHECKPOINT

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.fixture(scope="module")
def stack() -> Iterator[Up]:
    """Small pools, so that slots are used again at once."""
    with up(DEFAULT_CHECKPOINT, "--contexts", 2, "--denoisers", 2, "--max-sessions", 4, *precision()) as running:
        yield running


SHORT = (
    Scenario("leaving", "", alike(12), clients=12, leave=0.6),
    Scenario("kill", "", mixed(16), clients=8, strike=strikes.kill((*strikes.TOWERS, "redis"), every_s=1.5)),
)


@pytest.mark.parametrize("scenario", SHORT, ids=lambda scenario: scenario.name)
def test_a_short_storm(stack: Up, scenario: Scenario) -> None:
    report = asyncio.run(weather(scenario, stack, 5.0, lambda line: None))
    assert not report.problems, "\n".join((*report.lines(), *stack.log[-20:]))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["stop", "stop-watched", "redis-stop", "equal-texts"])
def test_a_longer_storm(name: str) -> None:
    scenario = scenarios()[name]
    with up(DEFAULT_CHECKPOINT, *scenario.options, *precision()) as running:
        report = asyncio.run(weather(scenario, running, 45.0, lambda line: None))
        report.exit_status = running.terminate()
    assert not report.problems, "\n".join(report.lines())
