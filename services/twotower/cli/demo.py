"""`twotower demo`: starts a stack on free ports, generates text from a prompt, and leaves nothing behind."""

from __future__ import annotations

import argparse
import asyncio
import sys
import time

from twotower.cli.options import add_checkpoint, add_stack_size
from twotower.events import Block, Finished

PROMPT = (
    "Mia has 7 apples. On Monday she buys 2 boxes of 5 apples. On Tuesday she gives 4 apples to Tom. "
    "How many apples does Mia have now?"
)


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the command."""
    parser = commands.add_parser("demo", help="start a stack, send it a prompt, show the text, stop", allow_abbrev=False)
    parser.add_argument("prompt", nargs="?", default=PROMPT, metavar="PROMPT")
    add_checkpoint(parser)
    add_stack_size(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Run the demo, and print each stage."""
    asyncio.run(_demo(args))


async def _demo(args: argparse.Namespace) -> None:
    from twotower.client.grpc_client import GatewayClient
    from twotower.launcher.config import on_free_ports
    from twotower.launcher.stack import stack

    config = on_free_ports(args.checkpoint, contexts=args.contexts, denoisers=args.denoisers)
    log: list[str] = []
    _say(f"starting redis, {config.contexts} context, {config.denoisers} denoiser and a gateway, as processes ...")
    started = time.perf_counter()
    async with stack(config, log.append) as running:
        _say(f"ready after {time.perf_counter() - started:.1f} s: grpc={running.grpc_address} http={running.http_address}")
        print(f"\n{args.prompt}", flush=True)
        first: float | None = None
        async with GatewayClient(running.grpc_address) as client:
            async for event in client.generate(args.prompt):
                if isinstance(event, Block | Finished):
                    first = first or time.perf_counter() - started
                    sys.stdout.write(event.text)
                    sys.stdout.flush()
                if isinstance(event, Finished):
                    print("\n", flush=True)
                    _say(
                        f"{event.completion_tokens} tokens in {event.blocks} blocks and {event.forwards} denoiser forwards, "
                        f"{event.seconds:.2f} s; first block {first:.1f} s after the stack's start"
                    )
    _say("stopped; nothing is left running")


def _say(line: str) -> None:
    print(f"[demo] {line}", flush=True)
