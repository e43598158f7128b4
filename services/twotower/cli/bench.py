"""`twotower bench`: what the parts and the whole can do, as tables for people and JSON for machines."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import sys
from contextlib import AsyncExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twotower.cli import bench_device, bench_speculative, bench_stalls, bench_streams
from twotower.cli.options import add_place, add_stack_size, add_trace, check_at_least_one, check_target
from twotower.errors import ConfigError
from twotower.transport.config import CHOICES, TransportKind

if TYPE_CHECKING:
    from twotower.bench.prefix import PrefixResult
    from twotower.bench.soak import Soak
    from twotower.bench.workload import Result, Workload

Commands = argparse._SubParsersAction


def add_parser(commands: Commands[argparse.ArgumentParser]) -> None:
    """The command and its parts."""
    bench = commands.add_parser("bench", help="measure the engine, the services, and what travels", allow_abbrev=False)
    parts = bench.add_subparsers(title="parts", metavar="PART", required=True)

    checkpoint = parts.add_parser("checkpoint", help="write a middle-sized checkpoint of random weights", allow_abbrev=False)
    checkpoint.add_argument("--out", type=Path, required=True, help="directory to write (about 0.9 GB)")
    checkpoint.add_argument("--seed", type=int, default=0)
    checkpoint.set_defaults(run=_checkpoint)

    engine = parts.add_parser("engine", help="both towers in one process, by batch size, and the plain way", allow_abbrev=False)
    _add_work(engine)
    engine.add_argument("--batch", type=int, nargs="+", default=[1, 4, 16], metavar="B")
    engine.add_argument("--no-plain", action="store_true", help="leave the baseline out, which is slow")
    engine.set_defaults(run=_engine)

    serving = parts.add_parser("serving", help="the whole stack against the engine", allow_abbrev=False)
    _add_work(serving)
    add_stack_size(serving)
    serving.add_argument(
        "--concurrency", type=int, nargs="+", default=[1, 16], metavar="C", help="requests in flight (default 1 16)"
    )
    serving.add_argument("--rate", type=float, metavar="R", help="send R requests a second at random moments instead")
    serving.add_argument("--slots", type=int, default=16, metavar="N", help="sessions each denoiser refines together")
    serving.add_argument("--tower-threads", type=int, metavar="N", help="CPU threads of each tower (default: as `twotower up`)")
    add_trace(serving)
    serving.set_defaults(run=_serving)

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

    soak = parts.add_parser("soak", help="the whole stack at full load for a long time", allow_abbrev=False)
    _add_work(soak)
    add_stack_size(soak)
    soak.add_argument("--minutes", type=float, default=20.0, metavar="M", help="default 20")
    soak.add_argument("--concurrency", type=int, default=16, metavar="C", help="requests in flight (default 16)")
    soak.add_argument("--prompts", type=int, default=32, metavar="N", help="different ones, asked in turn (default 32)")
    soak.set_defaults(run=_soak)

    bench_streams.add_part(parts)
    bench_speculative.add_part(parts)
    bench_stalls.add_part(parts)
    bench_device.add_parts(parts)

    transport = parts.add_parser("transport", help="what travels at the real size, and how fast", allow_abbrev=False)
    transport.add_argument("--tokens", type=int, default=1024, metavar="N", help="tokens of the snapshot (default 1024)")
    transport.add_argument("--rounds", type=int, default=20, metavar="N", help="transfers of each kind (default 20)")
    transport.add_argument(
        "--only", nargs="+", choices=CHOICES[1:], default=CHOICES[1:], help="these transports (default: all)"
    )
    transport.add_argument("--json", action="store_true", help="print one JSON object")
    transport.set_defaults(run=_transport)


def _add_work(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="DIR", help="see `twotower bench checkpoint`")
    parser.add_argument("--prompt-tokens", type=int, default=64, metavar="N", help="default 64")
    parser.add_argument("--max-tokens", type=int, default=64, metavar="N", help="default 64")
    parser.add_argument("--steps", type=int, default=5, metavar="T", help="forwards a block (default 5: 3.2 tokens a forward)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="requests for each place in the batch (default 3)")
    add_place(parser)
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads of the engine (default: all)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _checkpoint(args: argparse.Namespace) -> None:
    from twotower.bench.checkpoint import write_random_checkpoint

    parameters = write_random_checkpoint(args.out, args.seed)
    print(f"{args.out}: {parameters / 1e6:.0f} M parameters a tower")


def _engine(args: argparse.Namespace) -> None:
    from twotower.bench.engine import EngineRow, engine_rows, open_engine, plain_result

    check_at_least_one(args, "rounds", "threads", "batch")
    threads, workload = _threads(args), _workload(args)

    def report(row: EngineRow) -> None:
        _say(args, f"batch {row.batch:>3}: {_told(row.result)}")

    engine = open_engine(args.checkpoint, dtype=args.dtype, device=args.device, threads=threads, kernels=args.kernels)
    rows = engine_rows(engine, workload, args.batch, args.rounds, report)
    told: dict[str, Any] = {"threads": threads, "rows": [{"batch": row.batch, **_as_json(row.result)} for row in rows]}
    told["batch_gain"] = rows[-1].result.tokens_per_s / rows[0].result.tokens_per_s
    _say(args, f"batch {rows[-1].batch} over batch {rows[0].batch}: {told['batch_gain']:.2f}x")
    if not args.no_plain:
        plain = plain_result(
            args.checkpoint, workload, args.rounds, dtype=args.dtype, device=args.device, threads=threads
        ).tokens_per_s
        told |= {"plain_tokens_per_s": plain, "engine_over_plain": rows[0].result.tokens_per_s / plain}
        _say(args, f"plain, batch 1: {plain:,.1f} tokens/s; engine over plain: {told['engine_over_plain']:.2f}x")
    _finish(args, told)


def _serving(args: argparse.Namespace) -> None:
    from twotower.bench.engine import engine_rows, open_engine
    from twotower.bench.sizes import delta_bytes, snapshot_bytes

    check_at_least_one(args, "rounds", "threads", "tower_threads", "contexts", "denoisers", "slots", "concurrency")
    if args.rate is not None and not args.rate > 0:
        raise ConfigError(f"rate: must be positive, not {args.rate}")
    threads, workload = _threads(args), _workload(args)
    most = max(args.concurrency)
    engine = open_engine(args.checkpoint, dtype=args.dtype, device=args.device, threads=threads, kernels=args.kernels)
    batches = sorted({1, most})
    rows = {
        row.batch: row.result
        for row in engine_rows(
            engine, workload, batches, args.rounds, lambda row: _say(args, f"engine, batch {row.batch:>3}: {_told(row.result)}")
        )
    }
    del engine  # its memory and its threads are the services' now
    results = asyncio.run(_served(args, workload))
    told = {
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
        "rows": [{"concurrency": c, **_as_json(result)} for c, result in results.items()],
    }
    _say(args, f"services over engine at {most}: {told['services_over_engine']:.3f}; batch gain {told['batch_gain']:.2f}x")
    _say(args, f"time to the first block: {told['ttft_ms']:.1f} ms, the engine's own {told['engine_ttft_ms']:.1f} ms")
    _finish(args, told)


async def _served(args: argparse.Namespace, workload: Workload) -> dict[int, Result]:
    """A stack, and the load; by concurrency (under a rate: by the greatest that was asked for)."""
    from twotower.bench.serving import closed_loop, open_loop
    from twotower.launcher.config import UpConfig
    from twotower.launcher.stack import stack

    config = UpConfig(
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
            _say(args, f"services, {how}: {_told(result)}")
    return results


def _prefix(args: argparse.Namespace) -> None:
    check_at_least_one(args, "prefix_tokens", "tail_tokens", "rounds", "steps", "contexts", "denoisers")
    if args.requests < 2:
        raise ConfigError(f"requests: must be at least 2, not {args.requests}")
    if args.target is not None:
        check_target(args.target)
    result, seed = asyncio.run(_shared_prefix(args))
    _say(args, f"first: {result.first_ms:,.1f} ms to the first block; following: {result.following_ms:,.1f} ms")
    _say(args, f"following over first: {result.ratio:.3f}")
    _say(args, f"a tail alone, its block refined: {result.alone_ms:,.1f} ms")
    _say(args, f"what the beginning costs the second, over the first: {result.beginning:.3f}")
    told = {
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
    _finish(args, told)


async def _shared_prefix(args: argparse.Namespace) -> tuple[PrefixResult, int]:
    """The result, and the seed of the prompts; with a stack of its own unless there is a target."""
    from twotower.bench.prefix import SharedPrompts, shared_prefix
    from twotower.client.grpc_client import GatewayClient
    from twotower.launcher.config import UpConfig
    from twotower.launcher.stack import stack

    async with AsyncExitStack() as exits:
        target = args.target
        if target is None:
            place = {"dtype": args.dtype, "device": args.device}
            config = UpConfig(args.checkpoint, contexts=args.contexts, denoisers=args.denoisers, **place)
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


def _transport(args: argparse.Namespace) -> None:
    from twotower.bench.sizes import delta_bytes, snapshot_bytes
    from twotower.bench.transport import measure

    check_at_least_one(args, "tokens", "rounds")
    told: dict[str, Any] = {"delta_bytes_real_size": delta_bytes(), "snapshot_bytes_real_size": snapshot_bytes(args.tokens)}
    _say(args, f"delta of a 16-token block: {told['delta_bytes_real_size']:,} bytes")
    _say(args, f"snapshot at {args.tokens:,} tokens: {told['snapshot_bytes_real_size']:,} bytes")
    for name in args.only:
        result = asyncio.run(measure(TransportKind(name), args.tokens, args.rounds))
        told[name] = {key: round(value, 3) for key, value in asdict(result).items()}
        _say(
            args,
            f"{name:>5}: snapshot {result.snapshot_ms:6.1f} ms ({result.gb_per_s:.2f} GB/s), delta {result.delta_ms:5.1f} ms",
        )
    _finish(args, told)


def _soak(args: argparse.Namespace) -> int:
    from twotower.bench.soak import expected_texts

    check_at_least_one(args, "threads", "contexts", "denoisers", "concurrency", "prompts")
    if not args.minutes > 0:
        raise ConfigError(f"minutes: must be positive, not {args.minutes}")
    workload = _workload(args)
    expected = expected_texts(
        args.checkpoint, workload, args.prompts, dtype=args.dtype, threads=_threads(args), kernels=args.kernels
    )
    result = asyncio.run(_soaked(args, workload, expected))
    growth = result.growth()
    told = {
        "minutes": result.seconds / 60,
        "requests": result.requests,
        "tokens_per_s": result.tokens / result.seconds,
        "wrong": result.wrong,
        "failed": result.failed,
        "memory_growth": {name: round(share, 4) for name, share in growth.items()},
        "memory_mb": {name: round(mb, 1) for name, mb in result.memory[-1].items()},
    }
    _say(args, f"{result.requests} requests in {told['minutes']:.1f} minutes, {result.wrong} wrong, {result.failed} failed")
    for name, mb in result.memory[-1].items():
        _say(args, f"{name}: {mb:,.0f} MB, {growth.get(name, 1.0):.3f} of what it was in the second quarter of the time")
    _finish(args, told)
    return int(result.wrong + result.failed > 0)


async def _soaked(args: argparse.Namespace, workload: Workload, expected: list[list[int]]) -> Soak:
    from twotower.bench.soak import soak
    from twotower.launcher.config import UpConfig
    from twotower.launcher.stack import stack

    def report(so_far: Soak) -> None:
        if len(so_far.memory) % 12 == 0:
            mb = ", ".join(f"{name} {size:,.0f}" for name, size in so_far.memory[-1].items())
            _say(args, f"{so_far.seconds / 60:.0f} min: {so_far.requests} requests, {so_far.wrong} wrong; MB: {mb}")

    config = UpConfig(
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


def _workload(args: argparse.Namespace) -> Workload:
    from twotower.bench.workload import Workload
    from twotower.model.checkpoint import Checkpoint
    from twotower.request import check_request

    limits = Checkpoint.open(args.checkpoint).limits
    workload = Workload(limits.vocab_size, args.prompt_tokens, args.max_tokens, args.steps, limits.block_size)
    check_request(workload.prompts(1)[0], workload.params, limits)
    return workload


def _threads(args: argparse.Namespace) -> int:
    threads: int = args.threads or len(os.sched_getaffinity(0))
    return threads


def _told(result: Result) -> str:
    return (
        f"{result.tokens_per_s:>8,.1f} tokens/s, first block {result.ttft_ms:,.0f} ms, "
        f"p50 {result.quantile_ms(50):,.0f} ms, p95 {result.quantile_ms(95):,.0f} ms ({result.requests} requests)"
    )


def _as_json(result: Result) -> dict[str, Any]:
    return {
        "requests": result.requests,
        "tokens_per_s": round(result.tokens_per_s, 2),
        "ttft_ms": round(result.ttft_ms, 2),
        "latency_p50_ms": round(result.quantile_ms(50), 2),
        "latency_p95_ms": round(result.quantile_ms(95), 2),
    }


def _say(args: argparse.Namespace, line: str) -> None:
    print(line, file=sys.stderr if args.json else sys.stdout, flush=True)


def _finish(args: argparse.Namespace, told: dict[str, Any]) -> None:
    if args.json:
        print(json.dumps({key: round(value, 4) if isinstance(value, float) else value for key, value in told.items()}))
