"""What is told of recorded spans, on spans whose overlaps are known."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from twotower.cli.main import main
from twotower.errors import ConfigError
from twotower.tracing.picture import levels
from twotower.tracing.timeline import Span, busiest, merged, overlap_s, read_spans, summarize, within


def step(start: float, end: float, batch: int = 1) -> Span:
    return Span("denoiser-2", "engine", "step", start, end, {"batch": batch})


def commit(start: float, end: float) -> Span:
    return Span("context-1", "engine", "commit", start, end, {"batch": 1})


def sent(start: float, end: float, session: str, name: str = "send delta") -> Span:
    return Span("context-1", "wire", name, start, end, {"session": session})


def test_intervals_that_touch_are_one() -> None:
    assert merged([step(3, 4), step(0, 1), step(1, 2), step(1.5, 1.8)]) == [(0, 2), (3, 4)]
    assert merged([]) == []


def test_overlap() -> None:
    assert overlap_s([(0, 2), (3, 5)], [(1, 4), (4.5, 9)]) == pytest.approx(1 + 1 + 0.5)
    assert overlap_s([(0, 1)], [(1, 2)]) == 0


def test_what_lies_within_is_cut() -> None:
    spans = [step(0, 2), step(2, 4), step(4, 6)]
    assert [(s.start_s, s.end_s) for s in within(spans, 1, 4)] == [(1, 2), (2, 4)]


def test_summary() -> None:
    spans = [step(0, 4), commit(3, 5), step(6, 10), sent(5, 5.5, "a"), sent(5.25, 7, "b"), sent(0, 1, "c", "send state")]
    told = summarize(spans)
    assert told.seconds == 10
    assert told.busy == {"context-1": pytest.approx(0.2), "denoiser-2": pytest.approx(0.8)}
    assert told.commits_hidden == pytest.approx(1 / 2)
    assert told.transfers_hidden == pytest.approx((1 + 1) / (1 + 2))
    deltas = told.kinds["send delta"]
    assert (deltas.count, deltas.seconds, deltas.behind_steps) == (2, pytest.approx(2), pytest.approx(1 / 2))
    assert deltas.mean_ms == pytest.approx(1e3 * (0.5 + 1.75) / 2)
    assert list(told.kinds) == ["commit", "send delta", "send state", "step"]


def test_the_busiest_stretch_is_where_most_blocks_are_refined() -> None:
    few, many = [step(i, i + 1, 1) for i in range(10)], [step(10 + i, 11 + i, 8) for i in range(5)]
    assert busiest([*few, *many, *[step(15 + i, 16 + i, 2) for i in range(10)]], 5) == 10
    assert busiest(few, 2) == pytest.approx(4)  # of equals the middle one: 0 to 8
    assert busiest([commit(0, 1)], 2) == 0
    two = [step(0, 3, 4), step(1, 3, 4), step(5, 6, 5), step(6, 7, 5)]  # 16 block-seconds in the first two seconds of both
    assert busiest(two, 2) == 1


def test_levels() -> None:
    spans = [sent(0, 2, "a"), sent(1, 3, "b"), sent(2.5, 4, "c"), sent(5, 6, "a"), sent(5.5, 7, "b"), sent(7, 8, "d")]
    # "a" keeps its level until its last span, so that "c" may not have it in between.
    assert levels(spans) == [0, 1, 2, 0, 1, 0]
    assert levels([step(0, 2), step(1, 3), step(2, 4)]) == [0, 1, 0]


def test_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="no spans"):
        read_spans(tmp_path)
    line = {"service": "denoiser-7", "lane": "engine", "name": "step", "start_ns": 5_000_000_000, "end_ns": 6_500_000_000}
    (tmp_path / "denoiser-7.jsonl").write_text(json.dumps({**line, "attributes": {"batch": 3}}) + "\n")
    (span,) = read_spans(tmp_path)
    assert span == Span("denoiser-7", "engine", "step", 0.0, 1.5, {"batch": 3})
    assert main(["trace", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["busy"] == {"denoiser-7": 1.0}
    for words, problem in (("--start 2", "start: nothing was recorded"), ("--seconds 0", "seconds: must be positive")):
        assert main(["trace", str(tmp_path), *words.split()]) == 1
        assert problem in capsys.readouterr().err
    (tmp_path / "broken.jsonl").write_text("{")
    assert main(["trace", str(tmp_path)]) == 1
    assert "broken.jsonl cannot be read" in capsys.readouterr().err
