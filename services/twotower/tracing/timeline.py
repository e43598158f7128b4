"""Recorded spans put side by side: how busy each lane was, what overlapped, and a picture."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from twotower.errors import ConfigError

COLORS = {
    "step": "#4477aa",
    "apply": "#66ccee",
    "commit": "#ee6677",
    "prefill": "#ccbb44",
    "decode": "#aa3377",
    "send state": "#bbbbbb",
    "send delta": "#228833",
    "receive state": "#bbbbbb",
    "await delta": "#99ddbb",
}


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
    """All spans under `directory`, from their earliest start, in seconds. Raises ConfigError where there are none."""
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
    """What of the spans lies between two times, cut to them."""
    return [
        Span(s.service, s.lane, s.name, max(s.start_s, start_s), min(s.end_s, end_s), s.attributes)
        for s in spans
        if s.start_s < end_s and s.end_s > start_s
    ]


def merged(spans: Iterable[Span]) -> Intervals:
    """When any of the spans was under way, as intervals that do not touch."""
    out: Intervals = []
    for span in sorted(spans, key=lambda span: span.start_s):
        if out and span.start_s <= out[-1][1]:
            out[-1] = out[-1][0], max(out[-1][1], span.end_s)
        else:
            out.append((span.start_s, span.end_s))
    return out


def overlap_s(a: Intervals, b: Intervals) -> float:
    """Seconds that lie in both."""
    total, i, j = 0.0, 0, 0
    while i < len(a) and j < len(b):
        total += max(0.0, min(a[i][1], b[j][1]) - max(a[i][0], b[j][0]))
        if a[i][1] < b[j][1]:
            i += 1
        else:
            j += 1
    return total


@dataclass(frozen=True, slots=True)
class Summary:
    """Of a stretch of time."""

    seconds: float
    busy: dict[str, float]
    """Share of the time that each process's engine computed."""
    commits_hidden: float
    """Share of the contexts' commit time in which a denoiser refined something."""
    transfers_hidden: float
    """Share of the transfers' time (state and deltas) in which a denoiser refined something."""


def summarize(spans: Sequence[Span]) -> Summary:
    """How busy the engines were, and what of commits and transfers cost no denoiser any time."""
    seconds = max(s.end_s for s in spans) - min(s.start_s for s in spans)
    engines: dict[str, list[Span]] = defaultdict(list)
    for span in spans:
        if span.lane == "engine":
            engines[span.service].append(span)
    steps = merged(span for span in spans if span.name == "step")

    def hidden(names: tuple[str, ...]) -> float:
        work = merged(span for span in spans if span.name in names)
        length = sum(end - start for start, end in work)
        return overlap_s(work, steps) / length if length else 1.0

    return Summary(
        seconds,
        {service: sum(end - start for start, end in merged(own)) / seconds for service, own in sorted(engines.items())},
        hidden(("commit",)),
        hidden(("send state", "send delta")),
    )


def draw(spans: Sequence[Span], out: Path) -> None:
    """A row for each lane of each process; work of several sessions in one lane is stacked."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.patches import Patch

    rows: dict[tuple[str, str], list[Span]] = defaultdict(list)
    for span in spans:
        rows[span.service, span.lane].append(span)
    zero = min(span.start_s for span in spans)
    figure, axes = plt.subplots(figsize=(12, 1.2 + 0.7 * len(rows)), layout="constrained")
    for y, own in enumerate(rows.values()):
        levels = _levels(own)
        height = 0.8 / (max(levels) + 1)
        for span, level in zip(own, levels, strict=True):
            where = (1e3 * (span.start_s - zero), 1e3 * (span.end_s - span.start_s))
            axes.broken_barh([where], (y - 0.4 + level * height, height), color=COLORS.get(span.name, "black"), linewidth=0)
            if "batch" in span.attributes and where[1] > 0.012 * 1e3 * (max(s.end_s for s in spans) - zero):
                middle = where[0] + where[1] / 2
                axes.text(middle, y, str(span.attributes["batch"]), ha="center", va="center", fontsize=7, color="white")
    axes.set_yticks(range(len(rows)), [f"{service}\n{lane}" for service, lane in rows], fontsize=8)
    axes.set_xlabel("ms (numbers: sessions in a forward)")
    names = list(dict.fromkeys(span.name for span in spans))
    handles = [Patch(color=COLORS.get(name, "black"), label=name) for name in names]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(names), fontsize=8, frameon=False)
    figure.savefig(out, dpi=130)
    plt.close(figure)


def _levels(spans: Sequence[Span]) -> list[int]:
    """For each span, the lowest level where it overlaps no other; spans in order of their starts."""
    ends: list[float] = []
    levels = []
    for span in spans:
        level = next((i for i, end in enumerate(ends) if end <= span.start_s), len(ends))
        ends[level : level + 1] = [span.end_s]
        levels.append(level)
    return levels
