"""`twotower bench speculative`: AR's text at the speed of diffusion, and what bad drafts cost."""

from __future__ import annotations

import argparse
import json
import os
import sys

from twotower.cli.options import add_checkpoint, add_place, check_at_least_one


def add_part(parts: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the part."""
    parser = parts.add_parser(
        "speculative", help="speculative mode against AR and diffusion: equal texts, and speed", allow_abbrev=False
    )
    add_checkpoint(parser)
    parser.add_argument("--texts", type=int, default=100, metavar="N", help="for each batch and temperature (default 100)")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 2, 4, 8], metavar="B", help="requests in flight")
    parser.add_argument("--temperature", type=float, nargs="+", default=[0.0, 0.8], metavar="X", help="default 0 0.8")
    parser.add_argument("--max-tokens", type=int, default=256, metavar="N", help="default 256")
    parser.add_argument("--seed", type=int, default=1, metavar="S", help="of the problems, and of what is drawn")
    parser.add_argument("--no-refused", action="store_true", help="leave out the denoiser all of whose drafts are refused")
    add_place(parser)
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: all)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Measure and print."""
    from twotower.bench.speculative import as_json, measure, table
    from twotower.engine.local import LocalEngine

    check_at_least_one(args, "threads", "texts", "max_tokens")
    threads = args.threads or len(os.sched_getaffinity(0))
    engine = LocalEngine(args.checkpoint, dtype=args.dtype, device=args.device, kernels=args.kernels, threads=threads)
    rows = []
    for batch in args.batch:
        for temperature in args.temperature:
            rows.append(
                measure(
                    engine,
                    texts=args.texts,
                    batch=batch,
                    temperature=temperature,
                    max_tokens=args.max_tokens,
                    seed=args.seed,
                    refused=not args.no_refused,
                )
            )
            print(table(rows[-1:]).splitlines()[-1], file=sys.stderr, flush=True)
    print(json.dumps({"rows": [as_json(row) for row in rows]}) if args.json else table(rows))
