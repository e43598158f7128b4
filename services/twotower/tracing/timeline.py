"""Recorded spans on a common time axis: how busy each lane was, and what overlapped."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from twotower.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Span:
    """One piece of work."""

    service: str
    lane: str
    name: str
    start_s: float
    end_s: float
    attributes: dict[str, Any] = field(default_factory=dict)


Intervals = list[tuple[float, float]]


def read_spans(directory: Path) -> list[Span]:
    """All spans under `directory`, in seconds since the earliest start. Raises ConfigError if there are none."""
    raw = []
    for path in sorted(directory.glob("*.jsonl")):
        try:
            raw += [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        except (OSError, ValueError) as error:
            raise ConfigError(f"trace: {path} cannot be read: {error}") from None
    if not raw:
        raise ConfigError(f"trace: no spans in {directory}; record some with `twotower up --trace {directory}`")
    zero = min(one["start_ns"] for one in raw)
    return sorted(
        (
            Span(
                one["service"],
                one["lane"],
                one["name"],
                (one["start_ns"] - zero) / 1e9,
                (one["end_ns"] - zero) / 1e9,
                one["attributes"],
            )
            for one in raw
        ),
        key=lambda span: span.start_s,
    )


def within(spans: Iterable[Span], start_s: float, end_s: float) -> list[Span]:
    """The parts of the spans between two times."""
    return [
        Span(s.service, s.lane, s.name, max(s.start_s, start_s), min(s.end_s, end_s), s.attributes)
        for s in spans
        if s.start_s < end_s and s.end_s > start_s
    ]


def busiest(spans: Sequence[Span], seconds: float) -> float:
    """The start of the interval of `seconds` in which denoisers refined the most blocks at a time; 0 without any block.

    Of equally busy intervals it is the middle one, since a run's start and end are not typical of it.
    """
    steps = [span for span in spans if span.name == "step"]
    if not steps:
        return 0.0
    starts, ends = (np.array([getattr(span, edge) for span in steps]) for edge in ("start_s", "end_s"))
    blocks = np.array([span.attributes.get("batch", 1) for span in steps], dtype=float)
    # Block-seconds up to each edge; between edges, the number of blocks does not change.
    edges, order = np.unique(np.concatenate([starts, ends]), return_inverse=True)
    change = np.zeros(len(edges))
    np.add.at(change, order, np.concatenate([blocks, -blocks]))
    done = np.concatenate([[0.0], np.cumsum(np.cumsum(change)[:-1] * np.diff(edges))])
    work = np.interp(starts + seconds, edges, done) - np.interp(starts, edges, done)
    best = np.flatnonzero(work >= work.max() * (1 - 1e-9))
    return float(starts[best[len(best) // 2]])


def merged(spans: Iterable[Span]) -> Intervals:
    """The times in which any of the spans was under way, as intervals that do not touch."""
    out: Intervals = []
    for span in sorted(spans, key=lambda span: span.start_s):
        if out and span.start_s <= out[-1][1]:
            out[-1] = out[-1][0], max(out[-1][1], span.end_s)
        else:
            out.append((span.start_s, span.end_s))
    return out


def overlap_s(a: Intervals, b: Intervals) -> float:
    """The seconds that lie in both."""
    total, i, j = 0.0, 0, 0
    while i < len(a) and j < len(b):
        total += max(0.0, min(a[i][1], b[j][1]) - max(a[i][0], b[j][0]))
        if a[i][1] < b[j][1]:
            i += 1
        else:
            j += 1
    return total


@dataclass(frozen=True, slots=True)
class SpanKind:
    """All spans of one name."""

    count: int
    seconds: float
    """The seconds in which any of them was under way."""
    mean_ms: float
    behind_steps: float
    """Share of `seconds` in which a denoiser refined a block, so that they cost no denoiser any time."""


@dataclass(frozen=True, slots=True)
class Summary:
    """The figures of an interval of time."""

    seconds: float
    busy: dict[str, float]
    """Share of the time that each process's engine computed."""
    kinds: dict[str, SpanKind]
    """The kinds by name: `step`, `commit`, `send delta` ..."""
    commits_hidden: float
    """Share of the contexts' commit time in which a denoiser refined a block."""
    transfers_hidden: float
    """Share of the sending time of states and deltas in which a denoiser refined a block."""


def summarize(spans: Sequence[Span]) -> Summary:
    """How busy the engines were, and which share of commits and transfers cost no denoiser any time."""
    seconds = max(s.end_s for s in spans) - min(s.start_s for s in spans)
    engines: dict[str, list[Span]] = defaultdict(list)
    names: dict[str, list[Span]] = defaultdict(list)
    for span in spans:
        names[span.name].append(span)
        if span.lane == "engine":
            engines[span.service].append(span)
    steps = merged(names["step"])

    def hidden(*which: str) -> float:
        work = merged(span for name in which for span in names[name])
        length = sum(end - start for start, end in work)
        return overlap_s(work, steps) / length if length else 1.0

    def kind(name: str, own: Sequence[Span]) -> SpanKind:
        length = sum(end - start for start, end in merged(own))
        return SpanKind(len(own), length, 1e3 * sum(s.end_s - s.start_s for s in own) / len(own), hidden(name))

    return Summary(
        seconds,
        {service: sum(end - start for start, end in merged(own)) / seconds for service, own in sorted(engines.items())},
        {name: kind(name, own) for name, own in sorted(names.items()) if own},
        hidden("commit"),
        hidden("send state", "send delta"),
    )
