"""`twotower bench stalls`: streams of one gateway beside clients that try to stall it."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys

from twotower.cli.bench_output import Parts
from twotower.cli.options import add_checkpoint


def add_part(parts: Parts[argparse.ArgumentParser]) -> None:
    """Register the command."""
    stalls = parts.add_parser("stalls", help="one gateway, and clients that try to stall it", allow_abbrev=False)
    add_checkpoint(stalls)
    stalls.add_argument("--seconds", type=float, default=20.0, metavar="S", help="of calm, and of storm (default 20)")
    stalls.add_argument("--only", default="", metavar="WORD", help="hostile clients whose name contains this")
    stalls.add_argument("--json", action="store_true", help="print one JSON object")
    stalls.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure and print; 1 if any stream failed."""
    from twotower.bench.stalls import StallsConfig, measure

    config = StallsConfig(args.checkpoint, args.seconds, only=args.only)
    result = asyncio.run(measure(config, lambda line: print(line, file=sys.stderr)))
    phases = {"calm": result.calm, "stormy": result.stormy}
    figures = {
        name: {
            "blocks": len(phase.gaps_s),
            "gap_p50_ms": round(phase.gap_ms(0.5), 1),
            "gap_p99_ms": round(phase.gap_ms(0.99), 1),
            "gap_max_ms": round(phase.gap_ms(1.0), 1),
            "own_lag_max_ms": round(1e3 * max(phase.lag_s), 1),
            "failed": len(phase.failures),
            "gateway_peak_bytes": phase.peak_bytes,
        }
        for name, phase in phases.items()
    }
    if args.json:
        print(json.dumps({**figures, "hostile": result.hostile}))
    else:
        for name, phase in figures.items():
            print(
                f"{name}: a block each {config.pace_s * 1e3:.0f} ms came after p50 {phase['gap_p50_ms']} ms, "
                f"p99 {phase['gap_p99_ms']} ms, {phase['gap_max_ms']} ms at most "
                f"(the client itself was {phase['own_lag_max_ms']} ms late at most); {phase['failed']} streams failed; "
                f"gateway {phase['gateway_peak_bytes'] / 1e6:.0f} MB at most"
            )
        print("what the hostile clients got: " + ", ".join(f"{kind} {count}" for kind, count in result.hostile.items()))
    for failure in sorted({failure for phase in phases.values() for failure in phase.failures})[:5]:
        print(f"failed: {failure}", file=sys.stderr)
    return int(any(phase.failures for phase in phases.values()))
