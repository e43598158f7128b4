"""`twotower gateway`, `context`, `denoiser`: one service each, as containers run them."""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path

from twotower.cli.options import (
    DEFAULT_REDIS,
    add_checkpoint,
    add_context_experts,
    add_drain,
    add_experts,
    add_place,
    add_prefix_memory,
    add_redis,
    add_revision,
    add_state_memory,
    add_trace,
    add_transport,
    check_at_least_one,
    check_drain,
)
from twotower.sizes import parse_bytes


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the three commands."""
    gateway = _add(commands, "gateway", "what clients talk to, over gRPC and HTTP")
    gateway.add_argument("--grpc-port", type=int, default=50051, metavar="P", help="default 50051; 0: any free port")
    gateway.add_argument("--http-port", type=int, default=8000, metavar="P", help="default 8000; 0: any free port")
    gateway.add_argument("--model-name", metavar="NAME", help="name under which the model is served (default: the directory's)")
    gateway.add_argument("--max-in-flight", type=int, default=256, metavar="N", help="requests at once (default 256)")
    gateway.add_argument("--max-body", metavar="SIZE", help="of one HTTP request's body (default 1M to 8M, by the context)")
    gateway.add_argument("--max-bodies", metavar="SIZE", help="of all HTTP requests' bodies (default eight of the largest)")
    gateway.add_argument(
        "--cors-origins",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="whose web pages may call the HTTP face, e.g. https://example.org; may be repeated; *: all (default: none)",
    )
    add_context_experts(gateway, "auto", "as the checkpoint stores them")
    gateway.set_defaults(run=run_gateway)

    context = _add(commands, "context", "the context tower: reads prompts, keeps the state of sessions")
    context.add_argument("--port", type=int, default=0, metavar="P", help="default 0: any free port")
    context.add_argument("--advertise", metavar="HOST:PORT", help="where others reach it, if not where it listens")
    _add_tower(context)
    context.add_argument("--max-sessions", type=int, default=64, metavar="N", help="sessions at once (default 64)")
    context.add_argument(
        "--max-waiting", type=int, default=256, metavar="N", help="sessions that wait for memory (default 256)"
    )
    context.add_argument(
        "--prefill-chunk", type=int, default=128, metavar="N", help="prompt tokens a forward, and a cached chunk (default 128)"
    )
    context.add_argument("--prefill-budget", type=int, default=512, metavar="N", help="tokens an iteration (default 512)")
    add_prefix_memory(context)
    context.add_argument("--metrics-port", type=int, metavar="P", help="Prometheus metrics over HTTP (default: none; 0: any)")
    context.set_defaults(run=run_context)

    denoiser = _add(commands, "denoiser", "a denoising worker: pulls sessions, writes their blocks")
    denoiser.add_argument("--port", type=int, default=0, metavar="P", help="of health checks; default 0: any free port")
    _add_tower(denoiser)
    add_context_experts(denoiser, "auto", "as the checkpoint stores them")
    denoiser.add_argument("--slots", type=int, default=8, metavar="N", help="sessions refined together (default 8)")
    denoiser.set_defaults(run=run_denoiser)


def run_gateway(args: argparse.Namespace) -> None:
    """Serve until SIGTERM."""
    from twotower.gateway.config import GatewayConfig
    from twotower.gateway.main import run

    check_at_least_one(args, "max_in_flight")
    check_drain(args)
    config = GatewayConfig(
        checkpoint=args.checkpoint,
        redis_url=args.redis,
        revision=args.revision,
        host=args.host,
        grpc_port=args.grpc_port,
        http_port=args.http_port,
        model_name=args.model_name,
        max_in_flight=args.max_in_flight,
        max_body_bytes=None if args.max_body is None else parse_bytes(args.max_body, "max_body"),
        max_bodies_bytes=None if args.max_bodies is None else parse_bytes(args.max_bodies, "max_bodies"),
        context_experts=args.context_experts,
        cors_origins=tuple(args.cors_origins),
        drain_s=args.drain,
    )
    asyncio.run(run(config))


def run_context(args: argparse.Namespace) -> None:
    """Serve until SIGTERM."""
    from twotower.context.config import ContextConfig
    from twotower.context.main import run

    check_at_least_one(args, "threads", "max_sessions", "max_waiting", "prefill_chunk", "prefill_budget")
    check_drain(args)
    config = ContextConfig(
        checkpoint=args.checkpoint,
        redis_url=args.redis,
        revision=args.revision,
        host=args.host,
        port=args.port,
        advertise=args.advertise,
        dtype=args.dtype,
        device=args.device,
        kernels=args.kernels,
        experts=args.experts,
        transport=args.transport,
        threads=args.threads,
        turns=args.turns,
        max_sessions=args.max_sessions,
        state_memory=args.state_memory,
        trace=args.trace,
        max_waiting=args.max_waiting,
        prefill_chunk=args.prefill_chunk,
        prefill_budget=args.prefill_budget,
        metrics_port=args.metrics_port,
        prefix_memory=args.prefix_memory,
        prefix_redis_memory=args.prefix_redis_memory,
        drain_s=args.drain,
    )
    asyncio.run(run(config))


def run_denoiser(args: argparse.Namespace) -> None:
    """Work until SIGTERM."""
    from twotower.denoiser.config import DenoiserConfig
    from twotower.denoiser.main import run

    check_at_least_one(args, "threads", "slots")
    check_drain(args)
    config = DenoiserConfig(
        checkpoint=args.checkpoint,
        redis_url=args.redis,
        revision=args.revision,
        host=args.host,
        port=args.port,
        dtype=args.dtype,
        device=args.device,
        kernels=args.kernels,
        experts=args.experts,
        context_experts=args.context_experts,
        transport=args.transport,
        threads=args.threads,
        turns=args.turns,
        state_memory=args.state_memory,
        trace=args.trace,
        slots=args.slots,
        drain_s=args.drain,
    )
    asyncio.run(run(config))


def _add(commands: argparse._SubParsersAction[argparse.ArgumentParser], name: str, description: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=description, description=description, allow_abbrev=False)
    add_checkpoint(parser)
    add_revision(parser)
    add_redis(parser, DEFAULT_REDIS, DEFAULT_REDIS)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1)")
    add_drain(parser)
    return parser


def _add_tower(parser: argparse.ArgumentParser) -> None:
    add_place(parser)
    add_experts(parser)
    add_transport(parser)
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="CPU threads (default 1)")
    parser.add_argument(
        "--turns", type=Path, metavar="FILE", help="take turns on the CPU cores with towers that name the same file"
    )
    add_state_memory(parser)
    add_trace(parser)
