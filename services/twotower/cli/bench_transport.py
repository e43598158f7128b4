"""`twotower bench transport`: what travels between the towers, and how fast."""

from __future__ import annotations

import argparse
import asyncio
from dataclasses import asdict
from typing import Any

from twotower.cli.bench_output import Parts, finish, say
from twotower.cli.options import check_at_least_one
from twotower.transport.config import CHOICES, TransportKind


def add_part(parts: Parts[argparse.ArgumentParser]) -> None:
    """Register the command."""
    transport = parts.add_parser("transport", help="what travels at the real size, and how fast", allow_abbrev=False)
    transport.add_argument("--tokens", type=int, default=1024, metavar="N", help="tokens of the snapshot (default 1024)")
    transport.add_argument("--rounds", type=int, default=20, metavar="N", help="transfers of each kind (default 20)")
    transport.add_argument(
        "--only", nargs="+", choices=CHOICES[1:], default=CHOICES[1:], help="these transports (default: all)"
    )
    transport.add_argument("--json", action="store_true", help="print one JSON object")
    transport.set_defaults(run=_transport)


def _transport(args: argparse.Namespace) -> None:
    from twotower.bench.sizes import delta_bytes, snapshot_bytes
    from twotower.bench.transport import measure

    check_at_least_one(args, "tokens", "rounds")
    figures: dict[str, Any] = {"delta_bytes_real_size": delta_bytes(), "snapshot_bytes_real_size": snapshot_bytes(args.tokens)}
    say(args, f"delta of a 16-token block: {figures['delta_bytes_real_size']:,} bytes")
    say(args, f"snapshot at {args.tokens:,} tokens: {figures['snapshot_bytes_real_size']:,} bytes")
    for name in args.only:
        result = asyncio.run(measure(TransportKind(name), args.tokens, args.rounds))
        figures[name] = {key: round(value, 3) for key, value in asdict(result).items()}
        say(
            args,
            f"{name:>5}: snapshot {result.snapshot_ms:6.1f} ms ({result.gb_per_s:.2f} GB/s), delta {result.delta_ms:5.1f} ms",
        )
    finish(args, figures)
