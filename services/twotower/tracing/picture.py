"""The timeline as a picture: a row for each process's engine and wire, with the spans of several sessions stacked."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from twotower.tracing.timeline import Span

COLORS = {
    "prefill": "#d9b44a",
    "commit": "#d1495b",
    "decode": "#8d5a97",
    "step": "#2e6f9e",
    "apply": "#00a6a6",
    "send state": "#9a9a9a",
    "receive state": "#c4c4c4",
    "send delta": "#2a9d4a",
    "await delta": "#bfe3c6",
}
LABELS = {
    "prefill": "prefill (read a prompt)",
    "commit": "commit (read a finished block)",
    "decode": "decode (AR token)",
    "step": "step (refine blocks)",
    "apply": "apply deltas",
}
ENGINE_HEIGHT = 1.0
LEVEL_HEIGHT = 0.24
GAP = 0.45


def draw(spans: Sequence[Span], out: Path) -> None:
    """Write the picture of these spans to `out`. Needs matplotlib."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.patches import Patch

    zero, end = min(span.start_s for span in spans), max(span.end_s for span in spans)
    rows = _rows(spans)
    heights = [ENGINE_HEIGHT if lane == "engine" else LEVEL_HEIGHT * (1 + max(levels(own))) for (_, lane), own in rows]
    figure, axes = plt.subplots(figsize=(12, 1.0 + 0.62 * (sum(heights) + GAP * len(rows))), layout="constrained")
    top, middles = 0.0, []
    for (_, lane), own in rows:
        height = ENGINE_HEIGHT if lane == "engine" else LEVEL_HEIGHT
        for span, level in zip(own, levels(own), strict=True):
            y, x, width = top + level * height, 1e3 * (span.start_s - zero), 1e3 * (span.end_s - span.start_s)
            axes.broken_barh([(x, width)], (y, 0.92 * height), color=COLORS.get(span.name, "black"), linewidth=0)
            if "batch" in span.attributes and width > 0.008 * 1e3 * (end - zero):
                middle = x + width / 2, y + height / 2
                axes.text(*middle, str(span.attributes["batch"]), ha="center", va="center", fontsize=8, color="white")
        row_height = height * (1 + max(levels(own)))
        middles.append(top + row_height / 2)
        top += row_height + GAP
    axes.set_ylim(top, -GAP)  # the first row on top
    axes.set_xlim(0, 1e3 * (end - zero))
    axes.set_yticks(middles, [f"{name}\n{lane}" for (name, lane), _ in rows], fontsize=10)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.grid(axis="x", color="#e5e5e5", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_xlabel("ms; numbers: sessions in a forward; on the wires, a level for each session")
    names = [name for name in COLORS if any(span.name == name for span in spans)]
    handles = [Patch(color=COLORS[name], label=LABELS.get(name, name)) for name in names]
    figure.legend(handles=handles, loc="outside upper center", ncols=min(5, len(names)), fontsize=9, frameon=False)
    figure.savefig(out, dpi=130)
    plt.close(figure)


def levels(spans: Sequence[Span]) -> list[int]:
    """A level for each span, such that spans of one level do not overlap; a session keeps its level while it has spans.

    The spans must be ordered by start.
    """
    ends: list[float] = []
    of_session: dict[str, int] = {}
    last = {span.attributes["session"]: span.end_s for span in spans if "session" in span.attributes}
    out = []
    for span in spans:
        session = span.attributes.get("session")
        level = of_session.get(session, -1) if session is not None else -1
        if level < 0:
            level = next((i for i, end in enumerate(ends) if end <= span.start_s), len(ends))
        if session is not None:
            of_session[session] = level
        ends[level : level + 1] = [span.end_s if session is None else max(span.end_s, last[session])]
        out.append(level)
    return out


def _rows(spans: Sequence[Span]) -> list[tuple[tuple[str, str], list[Span]]]:
    """Spans by process and lane: contexts first, each with its engine before its wire; processes are numbered."""
    rows: dict[tuple[str, str], list[Span]] = defaultdict(list)
    for span in spans:
        rows[span.service, span.lane].append(span)
    kinds: dict[str, list[str]] = defaultdict(list)
    for service in sorted({service for service, _ in rows}):
        kinds[service.rpartition("-")[0]].append(service)
    names = {s: f"{kind} {i}" if len(own) > 1 else kind for kind, own in kinds.items() for i, s in enumerate(own)}
    # A denoiser's wire is placed between the engines, so that transfers between them read from top to bottom.
    order = sorted(rows, key=lambda row: (names[row[0]], (row[1] == "wire") != names[row[0]].startswith("denoiser")))
    return [((names[service], lane), rows[service, lane]) for service, lane in order]
