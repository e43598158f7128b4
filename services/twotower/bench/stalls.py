"""Streams through one gateway beside clients that try to stall it: the streams' waits, and the gateway's memory."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path

from twotower.bench.streams import START_S, STOP_S, grpc_stream, http_stream
from twotower.client.grpc_client import GatewayClient
from twotower.errors import TwoTowerError, Unavailable
from twotower.gateway.bodies import body_limits
from twotower.launcher.embedded_redis import EmbeddedRedis
from twotower.launcher.process import Say, ServiceProcess
from twotower.model.checkpoint import Checkpoint
from twotower.text.tokenizer import Tokenizer

STREAMS = 16
SAMPLE_S = 0.02


@dataclass(frozen=True, slots=True)
class StallsConfig:
    """The load on the gateway."""

    checkpoint: Path
    """The checkpoint, of which only the tokenizer is read."""
    seconds: float
    """Seconds without hostile clients, and then again with them."""
    pace_s: float = 0.05
    """Seconds a block of each stream."""
    only: str = ""
    """Only the kinds of hostile clients whose name contains this run."""


@dataclass(slots=True)
class Phase:
    """A measurement with or without hostile clients."""

    gaps_s: list[float] = field(default_factory=list)
    """Times between two blocks of a stream."""
    lag_s: list[float] = field(default_factory=list)
    """How late this process itself was, a part of the gaps that is not due to the gateway."""
    failures: list[str] = field(default_factory=list)
    peak_bytes: int = 0
    """The gateway's peak memory."""

    def gap_ms(self, share: float) -> float:
        """A quantile of the gaps."""
        ordered = sorted(self.gaps_s)
        return 1e3 * ordered[min(len(ordered) - 1, int(share * len(ordered)))]


@dataclass(slots=True)
class Stalls:
    """The results of both phases."""

    calm: Phase
    stormy: Phase
    hostile: dict[str, int]
    """The outcomes of the hostile clients."""


async def measure(config: StallsConfig, say: Say) -> Stalls:
    """Start Redis, a gateway and a simulated worker; stream without hostile clients, then with them.

    Raises TwoTowerError if a process does not start.
    """
    checkpoint = Checkpoint.open(config.checkpoint)
    if checkpoint.tokenizer_path is None:
        raise Unavailable(f"{config.checkpoint} has no tokenizer: there would be no text to send")
    async with AsyncExitStack() as exits:
        redis = EmbeddedRedis(say)
        exits.push_async_callback(redis.stop)
        await redis.start()
        common = ("--redis", redis.url)
        worker_words = ("-m", "twotower.bench.simulated_context", *common, "--identity", checkpoint.identity)
        worker = ServiceProcess("worker", [sys.executable, *worker_words, "--pace", str(config.pace_s)], say)
        words = ("-m", "twotower.cli.main", "gateway", *common, "--checkpoint", str(config.checkpoint), "--drain", "1")
        gateway = ServiceProcess("gateway", [sys.executable, *words, "--grpc-port", "0", "--http-port", "0"], say)
        for process in (worker, gateway):
            exits.push_async_callback(process.stop, STOP_S)
            await process.start()
        await worker.wait_ready(START_S)
        addresses = await gateway.wait_ready(START_S)
        client = await exits.enter_async_context(GatewayClient(addresses["grpc"]))
        calm, stormy = Phase(), Phase()
        await _watch(Phase(), 2.0, gateway, client, addresses["http"])
        await _watch(calm, config.seconds, gateway, client, addresses["http"])
        token_bytes = Tokenizer.load(checkpoint.tokenizer_path).max_token_bytes
        largest, _ = body_limits(None, None, checkpoint.limits.max_context, token_bytes)
        attack = ("--grpc", addresses["grpc"], "--http", addresses["http"], "--body", str(largest), "--only", config.only)
        storm = await asyncio.create_subprocess_exec(
            *("nice", "-n", "10", sys.executable, "-m", "twotower.bench.hostile"),
            *(*attack, "--seconds", str(config.seconds)),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )
        assert storm.stdout is not None
        await storm.stdout.readline()
        await _watch(stormy, config.seconds, gateway, client, addresses["http"])
        out, _ = await storm.communicate()
        if gateway.pid is None:
            raise Unavailable("the gateway has ended")
    return Stalls(calm, stormy, json.loads(out))


async def _watch(phase: Phase, seconds: float, gateway: ServiceProcess, client: GatewayClient, http: str) -> None:
    """Keep the streams going for `seconds`."""
    pid, end = gateway.pid, time.perf_counter() + seconds
    assert pid is not None

    async def stream(index: int) -> None:
        prompt, most = [5 + index] * 8, 2048
        while time.perf_counter() < end:
            pieces = grpc_stream(client, prompt, most) if index % 2 else http_stream(http, prompt, most)
            await _time(phase, pieces, end)

    tasks = [asyncio.create_task(stream(i)) for i in range(STREAMS)]
    while time.perf_counter() < end:
        before = time.perf_counter()
        await asyncio.sleep(SAMPLE_S)
        phase.lag_s.append(time.perf_counter() - before - SAMPLE_S)
        phase.peak_bytes = max(phase.peak_bytes, _resident_bytes(pid))
    await asyncio.gather(*tasks)


async def _time(phase: Phase, pieces: AsyncIterator[tuple[Sequence[int], str]], end: float) -> None:
    last: float | None = None
    try:
        async for _ in pieces:
            now = time.perf_counter()
            if last is not None:
                phase.gaps_s.append(now - last)
            last = now
            if now > end:
                break
    except (TwoTowerError, OSError, ValueError) as error:
        phase.failures.append(f"{type(error).__name__}: {error}")
        await asyncio.sleep(0.1)


def _resident_bytes(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmRSS:"))
