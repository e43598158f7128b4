"""Streams through a gateway process of its own: none is lost, and each costs little memory."""

from __future__ import annotations

import json
import sys

import pytest

from twotower.cli.main import main

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.mark.parametrize(
    ("streams", "pace", "megabytes"), [(100, 0.2, 200), pytest.param(1000, 2.0, 1000, marks=pytest.mark.slow)]
)
def test_streams(capfd: pytest.CaptureFixture[str], streams: int, pace: float, megabytes: int) -> None:
    assert main(f"bench streams --streams {streams} --blocks 5 --pace {pace} --json".split()) == 0
    told = json.loads(capfd.readouterr().out)
    assert (told["complete"], told["wrong"], told["failed"]) == (streams, 0, 0)
    assert told["most_at_once"] == streams
    assert 10 < told["gateway_peak_bytes"] / 1e6 < megabytes


def test_what_cannot_be_is_told(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "streams", "--streams", "0"]) == 1
    assert main(["bench", "streams", "--pace", "-1"]) == 1
    assert capfd.readouterr().err.splitlines() == [
        "error: streams: must be at least 1, not 0",
        "error: pace: must not be negative, but is -1.0",
    ]
