"""The records of a directory as a page: a table of all of them, and a picture of each ratio over time."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from twotower.bench.record import Record
from twotower.errors import ConfigError

PAGE, PICTURE = "README.md", "history.svg"

COLORS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf")
"""Colours of machines, in the order in which they first appear; they repeat after the last."""

WIDTH, HEIGHT, GAP = 380, 170, 20
LEFT, RIGHT, TOP, BOTTOM = 60, 14, 28, 24
"""A panel's size, the space between two panels, and its margins, in pixels."""


@dataclass(frozen=True, slots=True)
class Shown:
    """How a ratio is shown."""

    name: str
    """A field of `Ratios`."""
    title: str
    form: str
    """The format spec of its values."""


SHOWN = (
    Shown("engine_over_plain", "engine over plain", "{:.2f}x"),
    Shown("services_over_engine", "services over engine", "{:.3f}"),
    Shown("batch_gain", "batch gain", "{:.2f}x"),
    Shown("bytes_a_block", "bytes a block", "{:,.0f}"),
    Shown("speedup", "speed-up over AR", "{:.2f}x"),
    Shown("retention", "retention", "{:.1%}"),
)

_HEAD = """# Benchmarks over time

Written by `make bench`, which adds a record of this machine and commit; do not edit. Each JSON file is one run.

- **engine over plain**: tokens a second of one request, our engine over the plain way to run the model.
- **services over engine**: tokens a second of a full batch, a stack of processes over both towers in one process.
- **batch gain**: tokens a second of the engine, a full batch over one request.
- **bytes a block**: what a worker is sent after each block of 16 tokens at the published model's size.
- **speed-up** and **retention**: tokens a second and share of problems solved, diffusion over AR, on built-in problems.

A ratio is the median of several, each of two sides that were measured in turns. Ratios of different machines say little about
each other; a `+` behind a commit says that the source differed from it.
"""


def read_records(directory: Path) -> list[Record]:
    """All records, the oldest first. Raises ConfigError, naming a file that is no record."""
    records = []
    for path in sorted(directory.glob("*.json")):
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(raw, dict):
                raise ConfigError("not a record of a benchmark: no JSON object")
            records.append(Record.from_json(raw))
        except (ValueError, ConfigError) as error:
            raise ConfigError(f"{path}: {error}") from None
    return sorted(records, key=lambda record: record.date)


def write_history(directory: Path) -> Path:
    """Write the page and its picture beside the records; returns the page. Raises ConfigError."""
    records = read_records(directory)
    (directory / PICTURE).write_text(picture(records), encoding="utf-8")
    page = directory / PAGE
    page.write_text(f"{_HEAD}\n![Ratios over time]({PICTURE})\n\n{table(records)}", encoding="utf-8")
    return page


def table(records: Sequence[Record]) -> str:
    """All records as a Markdown table, the newest first."""
    lines = [
        "| date | commit | machine | " + " | ".join(shown.title for shown in SHOWN) + " |",
        "|---" * (3 + len(SHOWN)) + "|",
    ]
    for record in reversed(records):
        values = " | ".join(shown.form.format(getattr(record.ratios, shown.name)) for shown in SHOWN)
        lines.append(f"| {record.date:%Y-%m-%d %H:%M} | {record.commit or 'unknown'} | {record.machine.label} | {values} |")
    return "\n".join(lines) + "\n"


def picture(records: Sequence[Record]) -> str:
    """A panel for each ratio, as SVG; a line joins the records of one machine."""
    machines = list(dict.fromkeys(record.machine.label for record in records))
    colors = {machine: COLORS[i % len(COLORS)] for i, machine in enumerate(machines)}
    rows = -(-len(SHOWN) // 2)
    width = 2 * WIDTH + 3 * GAP
    legend = rows * (HEIGHT + GAP) + GAP
    height = legend + 18 * len(machines) + GAP
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="11" fill="#333">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for i, shown in enumerate(SHOWN):
        x, y = GAP + i % 2 * (WIDTH + GAP), GAP + i // 2 * (HEIGHT + GAP)
        parts.append(f'<g transform="translate({x} {y})">{_panel(shown, records, colors)}</g>')
    for i, machine in enumerate(machines):
        y = legend + 18 * i
        parts.append(f'<circle cx="{GAP + 6}" cy="{y + 4}" r="4" fill="{colors[machine]}"/>')
        parts.append(f'<text x="{GAP + 18}" y="{y + 8}">{escape(machine)}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(shown: Shown, records: Sequence[Record], colors: dict[str, str]) -> str:
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    parts = [
        f'<text x="{LEFT}" y="16" font-size="13" font-weight="bold">{escape(shown.title)}</text>',
        f'<path d="M{LEFT} {TOP}V{bottom}H{right}" fill="none" stroke="#bbb"/>',
    ]
    if not records:
        return "".join(parts)
    times = [record.date.timestamp() for record in records]
    values = [float(getattr(record.ratios, shown.name)) for record in records]
    low, high = _range(values)
    span = max(times) - min(times)

    def place(time: float, value: float) -> tuple[float, float]:
        along = (time - min(times)) / span if span else 0.5
        return LEFT + 8 + along * (right - LEFT - 16), bottom - (value - low) / (high - low) * (bottom - TOP)

    for value in (low, (low + high) / 2, high):
        _, y = place(times[0], value)
        parts.append(f'<path d="M{LEFT} {y:.1f}H{right}" stroke="#eee"/>')
        parts.append(f'<text x="{LEFT - 5}" y="{y + 4:.1f}" text-anchor="end">{shown.form.format(value)}</text>')
    for record, anchor, end in ((records[0], "start", LEFT), (records[-1], "end", right))[: 2 if span else 1]:
        parts.append(f'<text x="{end}" y="{HEIGHT - 8}" text-anchor="{anchor}">{record.date:%Y-%m-%d}</text>')
    for machine, color in colors.items():
        own = [i for i, record in enumerate(records) if record.machine.label == machine]
        points = [place(times[i], values[i]) for i in own]
        parts.append(f'<polyline points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}" fill="none" stroke="{color}"/>')
        for i, (x, y) in zip(own, points, strict=True):
            label = f"{records[i].date:%Y-%m-%d %H:%M}, {records[i].commit or 'unknown'}: {shown.form.format(values[i])}"
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{color}"><title>{escape(label)}</title></circle>')
    return "".join(parts)


def _range(values: Sequence[float]) -> tuple[float, float]:
    """The range of an axis: that of all values, with some room around it."""
    low, high = min(values), max(values)
    room = 0.15 * (high - low) or 0.05 * abs(high) or 1.0
    return low - room, high + room
