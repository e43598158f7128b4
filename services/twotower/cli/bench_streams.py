"""`twotower bench streams`: how many streams one gateway holds, with simulated workers."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys

from twotower.cli.bench_output import Parts
from twotower.cli.options import add_checkpoint, check_at_least_one
from twotower.errors import ConfigError


def add_part(parts: Parts[argparse.ArgumentParser]) -> None:
    """Register the command."""
    streams = parts.add_parser("streams", help="one gateway, many streams, workers that only pretend", allow_abbrev=False)
    add_checkpoint(streams)
    streams.add_argument("--streams", type=int, default=1000, metavar="N", help="half gRPC, half HTTP (default 1000)")
    streams.add_argument("--blocks", type=int, default=10, metavar="N", help="of each stream (default 10)")
    streams.add_argument("--pace", type=float, default=2.0, metavar="S", help="seconds a block of a stream (default 2)")
    streams.add_argument("--json", action="store_true", help="print one JSON object")
    streams.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure and print; 1 if any stream was wrong or failed."""
    from twotower.bench.streams import StreamsConfig, measure

    check_at_least_one(args, "streams", "blocks")
    if not args.pace >= 0:
        raise ConfigError(f"pace: must not be negative, but is {args.pace}")
    config = StreamsConfig(args.checkpoint, args.streams, args.blocks, args.pace)
    result = asyncio.run(measure(config, lambda line: print(line, file=sys.stderr)))
    figures = {
        "streams": args.streams,
        "most_at_once": result.most_at_once,
        "complete": result.complete,
        "wrong": result.wrong,
        "failed": len(result.failures),
        "seconds": round(result.seconds, 2),
        "first_block_p50_ms": round(result.first_block_ms(50), 1),
        "first_block_p95_ms": round(result.first_block_ms(95), 1),
        "gateway_peak_bytes": result.gateway_peak_bytes,
        "gateway_cpu_s": round(result.gateway_cpu_s, 2),
    }
    if args.json:
        print(json.dumps(figures))
    else:
        blocks = args.streams * args.blocks / result.seconds
        print(f"{result.complete} of {args.streams} streams complete, {result.wrong} wrong, {len(result.failures)} failed")
        print(f"{result.most_at_once} at one time, {blocks:,.0f} blocks/s over {result.seconds:.1f} s")
        print(f"first block p50 {figures['first_block_p50_ms']:,.0f} ms, p95 {figures['first_block_p95_ms']:,.0f} ms")
        print(f"gateway: {result.gateway_peak_bytes / 1e6:,.0f} MB at most, {result.gateway_cpu_s:.1f} s of CPU time")
    for failure in sorted(set(result.failures))[:5]:
        print(f"failed: {failure}", file=sys.stderr)
    return int(result.complete < args.streams)
