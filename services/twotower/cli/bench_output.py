"""What the parts of `twotower bench` share: the options of a workload, and how results are printed."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twotower.cli.options import add_place

if TYPE_CHECKING:
    from twotower.bench.workload import Result, Workload

Parts = argparse._SubParsersAction
"""The parser's group of commands, to which each part adds its own."""


def add_work(parser: argparse.ArgumentParser) -> None:
    """Add the options of a part that generates text with a checkpoint."""
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="DIR", help="see `twotower bench checkpoint`")
    parser.add_argument("--prompt-tokens", type=int, default=64, metavar="N", help="default 64")
    parser.add_argument("--max-tokens", type=int, default=64, metavar="N", help="default 64")
    parser.add_argument("--steps", type=int, default=5, metavar="T", help="forwards a block (default 5: 3.2 tokens a forward)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="requests for each place in the batch (default 3)")
    add_place(parser)
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads of the engine (default: all)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def workload_of(args: argparse.Namespace) -> Workload:
    """The workload that the options describe. Raises TwoTowerError if the checkpoint cannot serve it."""
    from twotower.bench.workload import Workload
    from twotower.model.checkpoint import Checkpoint
    from twotower.request import check_request

    limits = Checkpoint.open(args.checkpoint).limits
    workload = Workload(limits.vocab_size, args.prompt_tokens, args.max_tokens, args.steps, limits.block_size)
    check_request(workload.prompts(1)[0], workload.params, limits)
    return workload


def threads_of(args: argparse.Namespace) -> int:
    """The number of CPU threads of the engine."""
    threads: int = args.threads or len(os.sched_getaffinity(0))
    return threads


def result_line(result: Result) -> str:
    """A result, for people."""
    return (
        f"{result.tokens_per_s:>8,.1f} tokens/s, first block {result.ttft_ms:,.0f} ms, "
        f"p50 {result.quantile_ms(50):,.0f} ms, p95 {result.quantile_ms(95):,.0f} ms ({result.requests} requests)"
    )


def result_json(result: Result) -> dict[str, Any]:
    """A result, for machines."""
    return {
        "requests": result.requests,
        "tokens_per_s": round(result.tokens_per_s, 2),
        "ttft_ms": round(result.ttft_ms, 2),
        "latency_p50_ms": round(result.quantile_ms(50), 2),
        "latency_p95_ms": round(result.quantile_ms(95), 2),
    }


def say(args: argparse.Namespace, line: str) -> None:
    """Print a line for people: on stdout, or on stderr if stdout is for machines."""
    print(line, file=sys.stderr if args.json else sys.stdout, flush=True)


def finish(args: argparse.Namespace, figures: dict[str, Any]) -> None:
    """Print the one JSON object, if --json was given."""
    if args.json:
        print(json.dumps({key: round(value, 4) if isinstance(value, float) else value for key, value in figures.items()}))
