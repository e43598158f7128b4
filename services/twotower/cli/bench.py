"""`twotower bench`: what the parts and the whole can do, as tables for people and JSON for machines."""

from __future__ import annotations

import argparse

from twotower.cli import (
    bench_device,
    bench_engine,
    bench_prefix,
    bench_record,
    bench_serving,
    bench_speculative,
    bench_stalls,
    bench_streams,
    bench_transport,
)
from twotower.cli.bench_output import Parts


def add_parser(commands: Parts[argparse.ArgumentParser]) -> None:
    """The command and its parts."""
    bench = commands.add_parser("bench", help="measure the engine, the services, and what travels", allow_abbrev=False)
    parts = bench.add_subparsers(title="parts", metavar="PART", required=True)
    bench_engine.add_parts(parts)
    bench_serving.add_parts(parts)
    bench_prefix.add_part(parts)
    bench_transport.add_part(parts)
    bench_streams.add_part(parts)
    bench_speculative.add_part(parts)
    bench_stalls.add_part(parts)
    bench_device.add_parts(parts)
    bench_record.add_part(parts)
