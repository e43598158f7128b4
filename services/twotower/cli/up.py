"""`twotower up`: the whole stack on this machine."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import sys

from twotower.cli.options import (
    add_checkpoint,
    add_context_experts,
    add_drain,
    add_experts,
    add_place,
    add_prefix_memory,
    add_redis,
    add_revision,
    add_stack_size,
    add_state_memory,
    add_trace,
    add_transport,
)
from twotower.launcher.config import UpConfig


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the command."""
    parser = commands.add_parser("up", help="start the whole stack on this machine", allow_abbrev=False)
    add_checkpoint(parser)
    add_revision(parser)
    add_stack_size(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1)")
    parser.add_argument("--grpc-port", type=int, default=50051, metavar="P", help="default 50051; 0: any free port")
    parser.add_argument("--http-port", type=int, default=8000, metavar="P", help="default 8000; 0: any free port")
    add_redis(parser, None, "an embedded one")
    add_place(parser)
    add_experts(parser)
    add_context_experts(parser, None, "as --experts")
    add_transport(parser)
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads of each tower (default: cores / towers)")
    parser.add_argument("--slots", type=int, default=8, metavar="N", help="sessions each denoiser refines together (default 8)")
    parser.add_argument("--max-sessions", type=int, default=64, metavar="N", help="sessions each context holds (default 64)")
    add_state_memory(parser)
    add_prefix_memory(parser)
    add_trace(parser)
    add_drain(parser)
    parser.add_argument(
        "--unhealthy-after",
        type=float,
        default=10.0,
        metavar="S",
        help="seconds a service may not answer before it is killed and started again (default 10; 0: never)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Serve until SIGTERM."""
    from twotower.launcher import up

    config = UpConfig(
        checkpoint=args.checkpoint,
        contexts=args.contexts,
        denoisers=args.denoisers,
        host=args.host,
        grpc_port=args.grpc_port,
        http_port=args.http_port,
        redis_url=args.redis,
        revision=args.revision,
        dtype=args.dtype,
        experts=args.experts,
        context_experts=args.context_experts or args.experts,
        device=args.device,
        kernels=args.kernels,
        transport=args.transport,
        threads=args.threads,
        slots=args.slots,
        max_sessions=args.max_sessions,
        state_memory=args.state_memory,
        prefix_memory=args.prefix_memory,
        prefix_redis_memory=args.prefix_redis_memory,
        trace=args.trace,
        drain_s=args.drain,
        unhealthy_after_s=args.unhealthy_after,
        debug=args.debug,
    )
    asyncio.run(up.run(config, _say))


def _say(line: str) -> None:
    """A stack outlives whoever read what it says."""
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)
