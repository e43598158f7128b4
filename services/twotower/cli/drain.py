"""`twotower drain`: have replicas let go of their work, and wait until they have; or call that off."""

from __future__ import annotations

import argparse
import asyncio
import time
from typing import TYPE_CHECKING

from twotower.errors import ServiceFailed
from twotower.service.config import ServiceConfig
from twotower.settings.command_line import add_settings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from redis.asyncio import Redis

    from twotower.broker.registry import Replica

LOOK_S = 0.2


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "drain",
        help="have replicas let go of their work",
        description="Have replicas take no more work and hand over what they have; prints a line for each that is drained. "
        "Without names: list who is live.",
        allow_abbrev=False,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="name or address of a replica, as the list has it")
    parser.add_argument("--off", action="store_true", help="call the drain off: go on serving")
    parser.add_argument("--wait", type=_seconds, default=60.0, metavar="S", help="seconds to wait until all obey (default: 60)")
    add_settings(parser, ServiceConfig, ["redis_url"])
    parser.set_defaults(run=run)


def _seconds(text: str) -> float:
    value = float(text)
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, not {text}")
    return value


def run(args: argparse.Namespace) -> None:
    """List, drain, or call off. Raises BrokerUnavailable, ConfigError, and ServiceFailed for those who did not obey in time."""
    asyncio.run(_run(args))


async def _run(args: argparse.Namespace) -> None:
    from twotower.broker import orders
    from twotower.broker.connection import connect

    redis = await connect(args.redis)
    try:
        replicas = await orders.everybody(redis)
        if not args.names:
            _list(replicas)
            return
        chosen = orders.named(replicas, args.names)
        for replica in chosen:
            await orders.order(redis, replica, drain=not args.off)
        await _wait(redis, chosen, args.wait, off=args.off)
    finally:
        await redis.aclose()


async def _wait(redis: Redis, replicas: Sequence[Replica], limit_s: float, *, off: bool) -> None:
    from twotower.broker import orders

    left, give_up = list(replicas), time.monotonic() + limit_s
    while left:
        for replica in list(left):
            now = await orders.seen(redis, replica)
            obeyed = (now is None or (now.draining and now.load == 0)) if not off else (now is not None and not now.draining)
            if obeyed:
                left.remove(replica)
                print(f"{'serving' if off else 'drained'} {replica.name}", flush=True)
        if left and time.monotonic() >= give_up:
            names = ", ".join(replica.name for replica in left)
            raise ServiceFailed(f"{names}: not {'serving' if off else 'drained'} within {limit_s:g} s")
        if left:
            await asyncio.sleep(LOOK_S)


def _list(replicas: Sequence[Replica]) -> None:
    for replica in replicas:
        state = "serving" if not replica.draining else "draining" if replica.load else "drained"
        print(f"{replica.kind:9} {replica.name:32} {replica.address:24} {state:9} load {replica.load}")
