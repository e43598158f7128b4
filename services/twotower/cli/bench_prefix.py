"""`twotower bench prefix`: prompts with a shared prefix."""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from twotower.cli.bench_output import Parts, finish, say
from twotower.cli.options import add_place, add_stack_size, check_at_least_one, check_target
from twotower.errors import ConfigError

if TYPE_CHECKING:
    from twotower.bench.prefix import PrefixResult


def add_part(parts: Parts[argparse.ArgumentParser]) -> None:
    """Register the command."""
    prefix = parts.add_parser("prefix", help="prompts that begin alike: what their beginning costs again", allow_abbrev=False)
    where = prefix.add_mutually_exclusive_group(required=True)
    where.add_argument("--checkpoint", type=Path, metavar="DIR", help="start a stack with it")
    where.add_argument("--target", metavar="HOST:PORT", help="use a gateway that runs")
    prefix.add_argument("--prefix-tokens", type=int, default=2000, metavar="N", help="shared by a round (default 2000)")
    prefix.add_argument("--tail-tokens", type=int, default=32, metavar="N", help="of each prompt alone (default 32)")
    prefix.add_argument("--requests", type=int, default=8, metavar="N", help="prompts of a round (default 8)")
    prefix.add_argument("--rounds", type=int, default=3, metavar="N", help="shared beginnings (default 3)")
    prefix.add_argument("--steps", type=int, default=5, metavar="T", help="forwards a block (default 5)")
    prefix.add_argument("--seed", type=int, metavar="S", help="of the prompts (default: one that no cache has met)")
    add_stack_size(prefix)
    add_place(prefix)
    prefix.add_argument("--json", action="store_true", help="print one JSON object")
    prefix.set_defaults(run=_prefix)


def _prefix(args: argparse.Namespace) -> None:
    check_at_least_one(args, "prefix_tokens", "tail_tokens", "rounds", "steps", "contexts", "denoisers")
    if args.requests < 2:
        raise ConfigError(f"requests: must be at least 2, not {args.requests}")
    if args.target is not None:
        check_target(args.target)
    result, seed = asyncio.run(_shared_prefix(args))
    say(args, f"first: {result.first_ms:,.1f} ms to the first block; following: {result.following_ms:,.1f} ms")
    say(args, f"following over first: {result.ratio:.3f}")
    say(args, f"a tail alone, its block refined: {result.alone_ms:,.1f} ms")
    say(args, f"what the beginning costs the second, over the first: {result.beginning:.3f}")
    figures = {
        "prefix_tokens": args.prefix_tokens,
        "tail_tokens": args.tail_tokens,
        "requests": args.requests,
        "rounds": args.rounds,
        "seed": seed,
        "first_ms": result.first_ms,
        "following_ms": result.following_ms,
        "following_over_first": result.ratio,
        "alone_ms": result.alone_ms,
        "beginning_over_first": result.beginning,
        "place_ms": [round(ms, 2) for ms in result.place_ms],
    }
    finish(args, figures)


async def _shared_prefix(args: argparse.Namespace) -> tuple[PrefixResult, int]:
    """The result, and the seed of the prompts; without a target, this starts its own stack."""
    from twotower.bench.prefix import SharedPrompts, shared_prefix
    from twotower.client.grpc_client import GatewayClient
    from twotower.launcher.config import on_free_ports
    from twotower.launcher.stack import stack

    async with AsyncExitStack() as exits:
        target = args.target
        if target is None:
            place = {"dtype": args.dtype, "device": args.device}
            config = on_free_ports(args.checkpoint, contexts=args.contexts, denoisers=args.denoisers, **place)
            running = await exits.enter_async_context(stack(config, lambda line: print(line, file=sys.stderr)))
            target = running.grpc_address
        client = await exits.enter_async_context(GatewayClient(target))
        model = await client.model()
        seed = random.SystemRandom().randrange(2**32) if args.seed is None else args.seed
        work = SharedPrompts(
            vocab_size=model.vocab_size,
            block_size=model.block_size,
            prefix_tokens=args.prefix_tokens,
            tail_tokens=args.tail_tokens,
            requests=args.requests,
            rounds=args.rounds,
            steps=args.steps,
            seed=seed,
        )
        return await shared_prefix(target, work), seed
