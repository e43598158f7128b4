"""`twotower bench serving` and `twotower bench soak`: a whole stack under load."""

from __future__ import annotations

import argparse
import asyncio
import sys
from typing import TYPE_CHECKING

from twotower.cli.bench_output import Parts, add_work, finish, result_json, result_line, say, threads_of, workload_of
from twotower.cli.options import add_stack_size, add_trace, check_at_least_one
from twotower.errors import ConfigError

if TYPE_CHECKING:
    from twotower.bench.soak import Soak
    from twotower.bench.workload import Result, Workload


def add_parts(parts: Parts[argparse.ArgumentParser]) -> None:
    """Register both commands."""
    serving = parts.add_parser("serving", help="the whole stack against the engine", allow_abbrev=False)
    add_work(serving)
    add_stack_size(serving)
    serving.add_argument(
        "--concurrency", type=int, nargs="+", default=[1, 16], metavar="C", help="requests in flight (default 1 16)"
    )
    serving.add_argument("--rate", type=float, metavar="R", help="send R requests a second at random moments instead")
    serving.add_argument("--slots", type=int, default=16, metavar="N", help="sessions each denoiser refines together")
    serving.add_argument("--tower-threads", type=int, metavar="N", help="CPU threads of each tower (default: as `twotower up`)")
    add_trace(serving)
    serving.set_defaults(run=_serving)

    soak = parts.add_parser("soak", help="the whole stack at full load for a long time", allow_abbrev=False)
    add_work(soak)
    add_stack_size(soak)
    soak.add_argument("--minutes", type=float, default=20.0, metavar="M", help="default 20")
    soak.add_argument("--concurrency", type=int, default=16, metavar="C", help="requests in flight (default 16)")
    soak.add_argument("--prompts", type=int, default=32, metavar="N", help="different ones, asked in turn (default 32)")
    soak.set_defaults(run=_soak)


def _serving(args: argparse.Namespace) -> None:
    from twotower.bench.engine import engine_rows, open_engine
    from twotower.bench.sizes import delta_bytes, snapshot_bytes

    check_at_least_one(args, "rounds", "threads", "tower_threads", "contexts", "denoisers", "slots", "concurrency")
    if args.rate is not None and not args.rate > 0:
        raise ConfigError(f"rate: must be positive, not {args.rate}")
    threads, workload = threads_of(args), workload_of(args)
    most = max(args.concurrency)
    engine = open_engine(args.checkpoint, dtype=args.dtype, device=args.device, threads=threads, kernels=args.kernels)
    batches = sorted({1, most})
    rows = {
        row.batch: row.result
        for row in engine_rows(
            engine,
            workload,
            batches,
            args.rounds,
            lambda row: say(args, f"engine, batch {row.batch:>3}: {result_line(row.result)}"),
        )
    }
    del engine  # leaves memory and threads to the services
    results = asyncio.run(_served(args, workload))
    figures = {
        "threads": threads,
        "contexts": args.contexts,
        "denoisers": args.denoisers,
        "concurrency": most,
        "engine_tokens_per_s": rows[most].tokens_per_s,
        "services_tokens_per_s": results[most].tokens_per_s,
        "services_over_engine": results[most].tokens_per_s / rows[most].tokens_per_s,
        "batch_gain": rows[most].tokens_per_s / rows[1].tokens_per_s,
        "ttft_ms": results[min(results)].ttft_ms,
        "engine_ttft_ms": rows[1].ttft_ms,
        "delta_bytes_real_size": delta_bytes(),
        "snapshot_bytes_real_size": snapshot_bytes(),
        "rows": [{"concurrency": c, **result_json(result)} for c, result in results.items()],
    }
    say(args, f"services over engine at {most}: {figures['services_over_engine']:.3f}; batch gain {figures['batch_gain']:.2f}x")
    say(args, f"time to the first block: {figures['ttft_ms']:.1f} ms, the engine's own {figures['engine_ttft_ms']:.1f} ms")
    finish(args, figures)


async def _served(args: argparse.Namespace, workload: Workload) -> dict[int, Result]:
    """Run the load on a stack; returns results by concurrency (for a fixed rate, under the greatest one given)."""
    from twotower.bench.serving import closed_loop, open_loop
    from twotower.launcher.config import on_free_ports
    from twotower.launcher.stack import stack

    config = on_free_ports(
        args.checkpoint,
        contexts=args.contexts,
        denoisers=args.denoisers,
        dtype=args.dtype,
        device=args.device,
        kernels=args.kernels,
        threads=args.tower_threads,
        trace=args.trace,
        slots=args.slots,
        max_sessions=max(64, *args.concurrency),
    )
    results: dict[int, Result] = {}
    async with stack(config, lambda line: print(line, file=sys.stderr)) as running:
        for concurrency in args.concurrency if args.rate is None else [max(args.concurrency)]:
            requests = args.rounds * concurrency
            if args.rate is None:
                result = await closed_loop(running.grpc_address, workload, requests, concurrency)
            else:
                result = await open_loop(running.grpc_address, workload, requests, args.rate)
            results[concurrency] = result
            how = f"concurrency {concurrency:>3}" if args.rate is None else f"{args.rate:g} requests/s"
            say(args, f"services, {how}: {result_line(result)}")
    return results


def _soak(args: argparse.Namespace) -> int:
    from twotower.bench.soak import expected_texts

    check_at_least_one(args, "threads", "contexts", "denoisers", "concurrency", "prompts")
    if not args.minutes > 0:
        raise ConfigError(f"minutes: must be positive, not {args.minutes}")
    workload = workload_of(args)
    expected = expected_texts(
        args.checkpoint, workload, args.prompts, dtype=args.dtype, threads=threads_of(args), kernels=args.kernels
    )
    result = asyncio.run(_soaked(args, workload, expected))
    growth = result.growth()
    figures = {
        "minutes": result.seconds / 60,
        "requests": result.requests,
        "tokens_per_s": result.tokens / result.seconds,
        "wrong": result.wrong,
        "failed": result.failed,
        "memory_growth": {name: round(share, 4) for name, share in growth.items()},
        "memory_mb": {name: round(mb, 1) for name, mb in result.memory[-1].items()},
    }
    say(args, f"{result.requests} requests in {figures['minutes']:.1f} minutes, {result.wrong} wrong, {result.failed} failed")
    for name, mb in result.memory[-1].items():
        say(args, f"{name}: {mb:,.0f} MB, {growth.get(name, 1.0):.3f} of what it was in the second quarter of the time")
    finish(args, figures)
    return int(result.wrong + result.failed > 0)


async def _soaked(args: argparse.Namespace, workload: Workload, expected: list[list[int]]) -> Soak:
    from twotower.bench.soak import soak
    from twotower.launcher.config import on_free_ports
    from twotower.launcher.stack import stack

    def report(so_far: Soak) -> None:
        if len(so_far.memory) % 12 == 0:
            mb = ", ".join(f"{name} {size:,.0f}" for name, size in so_far.memory[-1].items())
            say(args, f"{so_far.seconds / 60:.0f} min: {so_far.requests} requests, {so_far.wrong} wrong; MB: {mb}")

    config = on_free_ports(
        args.checkpoint,
        contexts=args.contexts,
        denoisers=args.denoisers,
        dtype=args.dtype,
        device=args.device,
        kernels=args.kernels,
        max_sessions=max(64, args.concurrency),
    )
    async with stack(config, lambda line: print(line, file=sys.stderr)) as running:
        services = [*running.towers, *([running.gateway] if running.gateway is not None else [])]
        pids = {service.name: service.pid for service in services if service.pid is not None}
        return await soak(
            running.grpc_address,
            workload,
            expected,
            seconds=60 * args.minutes,
            concurrency=args.concurrency,
            pids=pids,
            report=report,
        )
