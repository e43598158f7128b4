"""The storms, by name."""

from __future__ import annotations

from tests.faults import strikes
from tests.faults.asks import alike, mixed
from tests.faults.storm import Scenario
from twotower_kernels.cpu.build import load

KILLS_S = 2.0
STOPPED_S = 30.0
NOTICED_S = 25.0
"""A request must have gone on elsewhere before the stopped process goes on."""


def scenarios() -> dict[str, Scenario]:
    """All of them; those that strike a worker and those that strike a context alone tell the two apart."""
    both = ("--contexts", 2, "--denoisers", 2)
    never = (*both, "--unhealthy-after", 0)
    found = (
        Scenario(
            "leaving",
            "clients that leave at any moment change nobody else's text",
            alike(60),
            options=("--contexts", 1, "--denoisers", 1, "--max-sessions", 8),
            clients=24,
            leave=0.6,
            room=8,
        ),
        Scenario(
            "kill",
            "a denoiser or a context is killed every two seconds, and every request ends with its text",
            mixed(64),
            options=("--contexts", 2, "--denoisers", 3),
            strike=strikes.kill(every_s=KILLS_S),
        ),
        Scenario("kill-denoiser", "the same, denoisers alone", mixed(64), strike=strikes.kill(("denoiser",), KILLS_S)),
        Scenario("kill-context", "the same, contexts alone, less often", mixed(64), strike=strikes.kill(("context",), 8.0)),
        Scenario(
            "stop",
            "a tower is stopped for 30 s and goes on, and `up` does not look: its sessions go on elsewhere",
            mixed(64),
            options=never,
            strike=strikes.stop(for_s=STOPPED_S),
            hung_s=NOTICED_S,
        ),
        Scenario(
            "stop-watched",
            "a tower is stopped for 30 s, and `up` replaces it before that is over",
            mixed(64),
            strike=strikes.stop(for_s=STOPPED_S),
            hung_s=NOTICED_S,
        ),
        Scenario(
            "redis",
            "Redis is killed, and what it held is lost: requests wait until it is back",
            mixed(64),
            strike=strikes.kill(("redis",), 8.0),
            must_wait=True,
        ),
        Scenario(
            "redis-stop",
            "Redis does not answer for so long that all announcements expire, again and again: requests wait",
            mixed(64),
            strike=strikes.stop(("redis",), for_s=8.0, rest_s=8.0),
            must_wait=True,
        ),
        Scenario("equal-texts", "a text among others is the text alone", mixed(160), clients=17),
    )
    return {scenario.name: scenario for scenario in found}


def precision() -> tuple[str, ...]:
    """Options of `twotower up` with which a text does not depend on its batch: plain torch has that in fp32 alone."""
    return () if load() is not None else ("--dtype", "float32")
