"""`twotower bench checkpoint` and `twotower bench engine`: both towers in one process."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from twotower.cli.bench_output import Parts, add_work, finish, result_json, result_line, say, threads_of, workload_of
from twotower.cli.options import check_at_least_one


def add_parts(parts: Parts[argparse.ArgumentParser]) -> None:
    """Register both commands."""
    checkpoint = parts.add_parser("checkpoint", help="write a middle-sized checkpoint of random weights", allow_abbrev=False)
    checkpoint.add_argument("--out", type=Path, required=True, help="directory to write (about 0.9 GB)")
    checkpoint.add_argument("--seed", type=int, default=0)
    checkpoint.set_defaults(run=_checkpoint)

    engine = parts.add_parser("engine", help="both towers in one process, by batch size, and the plain way", allow_abbrev=False)
    add_work(engine)
    engine.add_argument("--batch", type=int, nargs="+", default=[1, 4, 16], metavar="B")
    engine.add_argument("--no-plain", action="store_true", help="leave the baseline out, which is slow")
    engine.set_defaults(run=_engine)


def _checkpoint(args: argparse.Namespace) -> None:
    from twotower.bench.checkpoint import write_random_checkpoint

    parameters = write_random_checkpoint(args.out, args.seed)
    print(f"{args.out}: {parameters / 1e6:.0f} M parameters a tower")


def _engine(args: argparse.Namespace) -> None:
    from twotower.bench.engine import EngineRow, engine_rows, open_engine, plain_result

    check_at_least_one(args, "rounds", "threads", "batch")
    threads, workload = threads_of(args), workload_of(args)

    def report(row: EngineRow) -> None:
        say(args, f"batch {row.batch:>3}: {result_line(row.result)}")

    engine = open_engine(args.checkpoint, dtype=args.dtype, device=args.device, threads=threads, kernels=args.kernels)
    rows = engine_rows(engine, workload, args.batch, args.rounds, report)
    figures: dict[str, Any] = {"threads": threads, "rows": [{"batch": row.batch, **result_json(row.result)} for row in rows]}
    figures["batch_gain"] = rows[-1].result.tokens_per_s / rows[0].result.tokens_per_s
    say(args, f"batch {rows[-1].batch} over batch {rows[0].batch}: {figures['batch_gain']:.2f}x")
    if not args.no_plain:
        plain = plain_result(
            args.checkpoint, workload, args.rounds, dtype=args.dtype, device=args.device, threads=threads
        ).tokens_per_s
        figures |= {"plain_tokens_per_s": plain, "engine_over_plain": rows[0].result.tokens_per_s / plain}
        say(args, f"plain, batch 1: {plain:,.1f} tokens/s; engine over plain: {figures['engine_over_plain']:.2f}x")
    finish(args, figures)
