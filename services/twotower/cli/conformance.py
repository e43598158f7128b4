"""`twotower conformance`: reference vectors, token for token."""

from __future__ import annotations

import argparse
import asyncio
import sys
from pathlib import Path

from twotower.cli.options import add_kernels, add_stack_size, check_at_least_one, check_target


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the command."""
    parser = commands.add_parser("conformance", help="run reference vectors", allow_abbrev=False)
    parser.add_argument("directories", nargs="+", type=Path, metavar="DIR", help="a checkpoint with cases.json beside it")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--local", action="store_true", help="in this process, states too (default)")
    where.add_argument("--services", action="store_true", help="through a stack that is started for each DIR")
    where.add_argument("--target", metavar="HOST:PORT", help="through the gateway there, which must serve DIR")
    add_stack_size(parser)
    parser.add_argument(
        "--concurrency", type=int, default=1, metavar="N", help="requests in flight, through services (default 1)"
    )
    add_kernels(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print misses, then the tally; 1 on any miss."""
    from twotower.conformance.run import Tally, run_local, run_target
    from twotower.conformance.vectors import load_cases
    from twotower.launcher.config import on_free_ports
    from twotower.launcher.stack import stack

    check_at_least_one(args, "concurrency")
    if args.target is not None:
        check_target(args.target)
    for directory in args.directories:
        load_cases(directory)  # a file that cannot be read is reported before anything runs

    async def run_services(directory: Path) -> Tally:
        size = {"contexts": args.contexts, "denoisers": args.denoisers}
        config = on_free_ports(directory, **size, dtype="float32", kernels=args.kernels)
        async with stack(config, lambda line: print(line, file=sys.stderr)) as running:
            return await run_target(directory, running.grpc_address, args.concurrency, print)

    total = Tally()
    for directory in args.directories:
        if args.target is not None:
            tally = asyncio.run(run_target(directory, args.target, args.concurrency, print))
        elif args.services:
            tally = asyncio.run(run_services(directory))
        else:
            tally = run_local(directory, print, args.kernels)
        print(f"{directory}: {tally}" + (f", {tally.skipped} mock-AR cases skipped: only --local" if tally.skipped else ""))
        total += tally
    print(total, flush=True)
    return 0 if total.perfect else 1
