"""`twotower bench record`: the ratios this project promises, kept with date, machine and commit, and plotted over time."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from twotower.cli.bench_output import Parts, say, threads_of
from twotower.cli.options import DEFAULT_CHECKPOINT, add_kernels


def add_part(parts: Parts[argparse.ArgumentParser]) -> None:
    """Register the command."""
    record = parts.add_parser("record", help="the ratios this project promises, kept and plotted over time", allow_abbrev=False)
    record.add_argument("--out", type=Path, required=True, metavar="DIR", help="where records, the page and the picture go")
    record.add_argument("--plot-only", action="store_true", help="measure nothing; draw what is there")
    record.add_argument(
        "--checkpoint",
        type=Path,
        metavar="DIR",
        help="of random weights, for speed (default: as `twotower bench checkpoint` writes, for this run only)",
    )
    record.add_argument(
        "--trained",
        type=Path,
        default=DEFAULT_CHECKPOINT,
        metavar="DIR",
        help="that solves the built-in problems, for speed-up and retention (default: the one that ships)",
    )
    record.add_argument("--batch", type=int, default=16, metavar="B", help="requests where a batch is full (default 16)")
    record.add_argument("--rounds", type=int, default=3, metavar="N", help="requests for each place in the batch (default 3)")
    record.add_argument("--repeats", type=int, default=3, metavar="N", help="times that each ratio is measured (default 3)")
    record.add_argument("--max-tokens", type=int, default=64, metavar="N", help="of each request (default 64)")
    record.add_argument("--problems", type=int, default=100, metavar="N", help="for speed-up and retention (default 100)")
    record.add_argument("--threads", type=int, metavar="N", help="CPU threads of the engine (default: all)")
    record.add_argument("--device", default="auto", help="auto (CUDA where there is one), cpu, cuda, cuda:N")
    add_kernels(record)
    record.add_argument("--json", action="store_true", help="print the record")
    record.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Measure, write, and draw."""
    from twotower.bench.checkpoint import write_random_checkpoint
    from twotower.bench.history import read_records, write_history
    from twotower.bench.record import RecordConfig, measure_record, write_record

    read_records(args.out)  # an unreadable record is reported now rather than in ten minutes
    if not args.plot_only:
        with tempfile.TemporaryDirectory(prefix="twotower-bench-") as scratch:
            config = RecordConfig(
                checkpoint=args.checkpoint or Path(scratch),
                trained=args.trained,
                threads=threads_of(args),
                batch=args.batch,
                rounds=args.rounds,
                repeats=args.repeats,
                max_tokens=args.max_tokens,
                problems=args.problems,
                device=args.device,
                kernels=args.kernels,
            )
            if args.checkpoint is None:
                say(args, "[bench] writing a checkpoint of random weights")
                write_random_checkpoint(config.checkpoint)
            record = measure_record(config, lambda line: say(args, line))
        path = write_record(record, args.out)
        say(args, f"wrote {path}")
        if args.json:
            json.dump(record.as_json(), sys.stdout)
            print()
    say(args, f"wrote {write_history(args.out)}")
