"""A storm's judges find what they look for."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.faults.asks import Answer, Ask
from tests.faults.remains import MORE_FILES, SEGMENTS, Remains
from tests.faults.storm import Report
from tests.faults.tally import Tally, reason_of

CALM = Answer(tuple(range(48)), "text")


@pytest.mark.parametrize(
    ("tokens", "text", "how"),
    [
        (CALM.tokens, "another", "the same tokens, another text"),
        (CALM.tokens[:32], "text", "it ends too early"),
        (CALM.tokens[:32] + CALM.tokens[16:], "text", "a block is repeated"),
        (CALM.tokens[:16] + CALM.tokens[32:], "text", "a block is missing"),
        ((*CALM.tokens[:-1], 7), "text", "other tokens"),
        ((), "", "it ends too early"),
    ],
)
def test_how_answers_differ(tokens: tuple[int, ...], text: str, how: str) -> None:
    tally = Tally()
    tally.answer(Ask("prompt"), CALM, CALM)
    tally.answer(Ask("prompt"), Answer(tokens, text), CALM)
    assert (tally.equal, dict(tally.different), tally.compared) == (1, {how: 1}, 2)
    assert Report("x", phases={"storm": tally}).problems == ["storm: 1 texts differ"]


def test_reasons_are_counted_together() -> None:
    said = (f"context 127.0.0.1:{port} has {port} sessions of {port:032x}" for port in (40_001, 50_002))
    assert {reason_of(text) for text in said} == {"context ADDRESS has N sessions of ID"}


def test_a_storm_in_which_nothing_was_compared_proves_nothing() -> None:
    assert Report("x", phases={"storm": Tally()}).problems == ["storm: nothing was compared"]
    assert Report("x", alive=False, exit_status=1).problems == ["the stack ended", "the drain ended with status 1"]


def _calm() -> Remains:
    files = dict.fromkeys(("gateway", "context", "denoiser", "redis", "up"), 20)
    processes = Counter({"gateway": 1, "context": 1, "denoiser": 2, "redis": 1})
    return Remains(processes, Counter(context=1, denoiser=2), files=files, segments=dict.fromkeys(files, 3))


def test_what_is_left_is_told() -> None:
    assert _calm().beyond(_calm()) == []
    left = _calm()
    left.load, left.queued, left.unacknowledged, left.others = 1, 2, 3, ["twotower-x"]
    left.announced["denoiser"] = 3
    left.files["context"] += MORE_FILES + 1
    left.segments["denoiser"] = SEGMENTS + 1
    assert left.beyond(_calm()) == [
        "announced: {'context': 1, 'denoiser': 3}, in the calm {'context': 1, 'denoiser': 2}",
        "sessions held: 1, in the calm 0",
        "entries queued: 2, in the calm 0",
        "entries not acknowledged: 3, in the calm 0",
        "files in /dev/shm: ['twotower-x'], in the calm []",
        f"file descriptors of a context: {20 + MORE_FILES + 1}, in the calm 20",
        f"shared memory segments of a denoiser: {SEGMENTS + 1}, in the calm 3",
    ]
