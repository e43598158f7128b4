"""`twotower trace`: what a recorded run spent its time on."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from twotower.errors import ConfigError


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the command."""
    parser = commands.add_parser("trace", help="summarize and draw spans recorded with `--trace`", allow_abbrev=False)
    parser.add_argument("directory", type=Path, metavar="DIR", help="where `twotower up --trace DIR` recorded")
    parser.add_argument("--start", type=float, default=0.0, metavar="S", help="seconds after the first span (default 0)")
    parser.add_argument("--seconds", type=float, metavar="S", help="length of the stretch (default: to the end)")
    parser.add_argument("--out", type=Path, metavar="PNG", help="draw the timeline (needs matplotlib: the train extra)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Print, and draw if asked."""
    from twotower.tracing.timeline import draw, read_spans, summarize, within
    from twotower.train.plot import can_plot

    end = float("inf") if args.seconds is None else args.start + args.seconds
    spans = within(read_spans(args.directory), args.start, end)
    if not spans:
        raise ConfigError(f"start: nothing was recorded between {args.start} and {end} seconds")
    summary = summarize(spans)
    if args.out is not None:
        if not can_plot():
            raise ConfigError("out: drawing needs matplotlib: pip install 'twotower[train]'")
        draw(spans, args.out)
    if args.json:
        told = {"seconds": summary.seconds, "busy": summary.busy}
        print(json.dumps(told | {"commits_hidden": summary.commits_hidden, "transfers_hidden": summary.transfers_hidden}))
        return
    print(f"{summary.seconds:.2f} s")
    for service, share in summary.busy.items():
        print(f"{service}: computing {share:.1%} of the time")
    print(f"commits: {summary.commits_hidden:.1%} of their time lies behind refinement")
    print(f"transfers: {summary.transfers_hidden:.1%} of their time lies behind refinement")
