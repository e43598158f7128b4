"""`twotower trace`: what a recorded run spent its time on."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

from twotower.errors import ConfigError

PICTURE_S = 0.4
"""Seconds of a run that the picture shows, enough to see at a glance."""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the command."""
    parser = commands.add_parser("trace", help="summarize and draw spans recorded with `--trace`", allow_abbrev=False)
    parser.add_argument("directory", type=Path, metavar="DIR", help="where `twotower up --trace DIR` recorded")
    parser.add_argument("--start", type=float, metavar="S", help="seconds after the first span (default: where most is done)")
    parser.add_argument("--seconds", type=float, metavar="S", help="of the stretch (default: 0.4 in a picture, else all)")
    parser.add_argument("--out", type=Path, metavar="PNG", help="draw the timeline (needs matplotlib: the train extra)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Print the summary, and draw the picture if one is asked for."""
    from twotower.tracing.timeline import busiest, read_spans, summarize, within
    from twotower.train.plot import can_plot

    if args.seconds is not None and not args.seconds > 0:
        raise ConfigError(f"seconds: must be positive, not {args.seconds}")
    if args.out is not None and not can_plot():
        raise ConfigError("out: drawing needs matplotlib: pip install 'twotower[train]'")
    spans = read_spans(args.directory)
    if args.out is not None:
        from twotower.tracing.picture import draw

        length = PICTURE_S if args.seconds is None else args.seconds
        start = busiest(spans, length) if args.start is None else args.start
        shown = within(spans, start, start + length)
        if not shown:
            raise ConfigError(f"start: nothing was recorded between {start} and {start + length} seconds")
        draw(shown, args.out)
    if args.start is not None or args.seconds is not None:
        length = float("inf") if args.seconds is None else args.seconds
        start = busiest(spans, length) if args.start is None else args.start
        spans = within(spans, start, start + length)
        if not spans:
            raise ConfigError(f"start: nothing was recorded between {start} and {start + length} seconds")
    summary = summarize(spans)
    if args.json:
        print(json.dumps(dataclasses.asdict(summary)))
        return
    print(f"{summary.seconds:.2f} s")
    for service, share in summary.busy.items():
        print(f"{service}: computing {share:.1%} of the time")
    print(f"{'':14}{'count':>8}{'mean ms':>10}{'of the time':>13}{'behind steps':>14}")
    for name, kind in summary.kinds.items():
        behind = "" if name == "step" else f"{kind.behind_steps:.1%}"
        print(f"{name:14}{kind.count:>8,}{kind.mean_ms:>10.1f}{kind.seconds / summary.seconds:>13.1%}{behind:>14}")
