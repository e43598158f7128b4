"""Many streams through one gateway, by gRPC and HTTP, with simulated workers: the cost of the gateway itself."""

from __future__ import annotations

import asyncio
import json
import os
import random
import statistics
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, field
from pathlib import Path

from twotower.client.grpc_client import GatewayClient
from twotower.errors import TwoTowerError, Unavailable
from twotower.events import Block, Finished
from twotower.launcher.embedded_redis import EmbeddedRedis
from twotower.launcher.process import Say, ServiceProcess
from twotower.model.checkpoint import Checkpoint
from twotower.rpc.files import allow_many_files
from twotower.text.stream import TextStream
from twotower.text.tokenizer import Tokenizer

CHANNELS = 8
"""gRPC connections that the streams share; over HTTP each has its own."""

START_S = 60.0
STOP_S = 10.0
PROMPT_TOKENS = 24


@dataclass(frozen=True, slots=True)
class StreamsConfig:
    """The load on the gateway."""

    checkpoint: Path
    """The checkpoint, of which only the tokenizer is read."""
    streams: int
    blocks: int
    pace_s: float
    """Seconds a block of each stream."""


@dataclass(slots=True)
class Streams:
    """The results of all streams."""

    most_at_once: int = 0
    complete: int = 0
    wrong: int = 0
    """Streams that ended without an error, but with other tokens or another text than the worker sent."""
    failures: list[str] = field(default_factory=list)
    first_block_s: list[float] = field(default_factory=list)
    seconds: float = 0.0
    gateway_peak_bytes: int = 0
    gateway_cpu_s: float = 0.0
    """User and system time over `seconds`."""

    def first_block_ms(self, percent: int) -> float:
        """A percentile of the time to the first block, which includes half a pace of the worker on average."""
        if len(self.first_block_s) < 2:
            return 1e3 * sum(self.first_block_s)
        return 1e3 * statistics.quantiles(self.first_block_s, n=100, method="inclusive")[percent - 1]


class _Load:
    """The clients."""

    def __init__(self, config: StreamsConfig, checkpoint: Checkpoint, tokenizer: Tokenizer) -> None:
        self._config = config
        self._limits = checkpoint.limits
        self._tokenizer = tokenizer
        self._open = 0
        self.result = Streams()

    def prompt(self, index: int) -> list[int]:
        """Tokens of one stream, which the worker repeats; no two streams have the same."""
        rng, hidden = random.Random(index), {*self._limits.eos_token_ids, self._limits.mask_token_id}
        visible = [i for i in range(self._limits.vocab_size) if i not in hidden and i not in self._tokenizer.special_ids]
        return rng.choices(visible, k=PROMPT_TOKENS)

    async def stream(self, index: int, pieces: AsyncIterator[tuple[Sequence[int], str]]) -> None:
        """Read one stream to its end, and check it. `pieces`: token ids (over gRPC only) and text."""
        result, started, first = self.result, time.perf_counter(), 0.0
        tokens: list[int] = []
        text = ""
        self._open += 1
        result.most_at_once = max(result.most_at_once, self._open)
        try:
            async for ids, piece in pieces:
                first = first or time.perf_counter() - started
                tokens += ids
                text += piece
        except (TwoTowerError, OSError, ValueError) as error:
            result.failures.append(f"{type(error).__name__}: {error}")
            return
        finally:
            self._open -= 1
        result.first_block_s.append(first)
        expected = self._expected(index)
        shown = TextStream(self._tokenizer, (), (*self._limits.eos_token_ids, self._limits.mask_token_id))
        right = text == shown.push(expected) + shown.finish() and (not tokens or tokens == expected)
        result.complete += right
        result.wrong += not right

    def _expected(self, index: int) -> list[int]:
        prompt, count = self.prompt(index), self.max_tokens
        return (prompt * (count // len(prompt) + 1))[:count]

    @property
    def max_tokens(self) -> int:
        """Tokens of each stream."""
        return self._config.blocks * self._limits.block_size


async def measure(config: StreamsConfig, say: Say) -> Streams:
    """Start Redis, one gateway and the simulated workers; open all streams, half over gRPC and half over HTTP.

    Raises TwoTowerError if a process does not start.
    """
    checkpoint = Checkpoint.open(config.checkpoint)
    if checkpoint.tokenizer_path is None:
        raise Unavailable(f"{config.checkpoint} has no tokenizer: there would be no text to compare")
    load = _Load(config, checkpoint, Tokenizer.load(checkpoint.tokenizer_path))
    allow_many_files()
    async with AsyncExitStack() as exits:
        redis = EmbeddedRedis(say)
        exits.push_async_callback(redis.stop)
        await redis.start()
        common = ("--redis", redis.url)
        worker_words = ("-m", "twotower.bench.simulated_context", *common, "--identity", checkpoint.identity)
        worker = ServiceProcess("worker", [sys.executable, *worker_words, "--pace", str(config.pace_s)], say)
        gateway_words = ("-m", "twotower.cli.main", "gateway", *common, "--checkpoint", str(config.checkpoint))
        ports = ("--grpc-port", "0", "--http-port", "0", "--max-in-flight", str(config.streams), "--drain", "1")
        gateway = ServiceProcess("gateway", [sys.executable, *gateway_words, *ports], say)
        for process in (worker, gateway):
            exits.push_async_callback(process.stop, STOP_S)
            await process.start()
        await worker.wait_ready(START_S)
        addresses = await gateway.wait_ready(START_S)
        pid = gateway.pid
        assert pid is not None  # it runs, since it is ready
        channels = [await exits.enter_async_context(GatewayClient(addresses["grpc"])) for _ in range(CHANNELS)]
        cpu, started = _cpu_s(pid), time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for i in range(config.streams):
                prompt, most = load.prompt(i), load.max_tokens
                use = (
                    grpc_stream(channels[i // 2 % CHANNELS], prompt, most)
                    if i % 2
                    else http_stream(addresses["http"], prompt, most)
                )
                group.create_task(load.stream(i, use))
                await asyncio.sleep(0)
        load.result.seconds = time.perf_counter() - started
        load.result.gateway_cpu_s = _cpu_s(pid) - cpu
        load.result.gateway_peak_bytes = _peak_bytes(pid)
    return load.result


async def grpc_stream(
    client: GatewayClient, prompt: Sequence[int], max_tokens: int
) -> AsyncIterator[tuple[Sequence[int], str]]:
    """Token ids and text of one request, block by block. Raises TwoTowerError."""
    async with aclosing(client.generate(prompt, max_tokens=max_tokens, ignore_eos=True)) as events:
        async for event in events:
            if isinstance(event, Block):
                yield event.token_ids, event.text
            elif isinstance(event, Finished):
                yield (), event.text


async def http_stream(address: str, prompt: Sequence[int], max_tokens: int) -> AsyncIterator[tuple[Sequence[int], str]]:
    """As `grpc_stream`, with text only. Raises ValueError for an answer that is no stream, or ends too early."""
    body = json.dumps({"prompt": list(prompt), "max_tokens": max_tokens, "ignore_eos": True, "stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\ncontent-length: {len(body)}\r\n\r\n"
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write(head.encode() + body)
        status = await reader.readline()
        if b" 200 " not in status:
            raise ValueError(status.decode(errors="replace").strip())
        async for line in reader:  # an event is one line, however the body is cut into chunks
            if line.startswith(b"data: [DONE]"):
                return
            if line.startswith(b"data: "):
                chunk = json.loads(line.removeprefix(b"data: "))
                if "error" in chunk:
                    raise ValueError(chunk["error"]["message"])
                yield (), "".join(choice["text"] for choice in chunk["choices"])
        raise ValueError("the stream ended too early")
    finally:
        writer.close()


def _cpu_s(pid: int) -> float:
    """User and system time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _peak_bytes(pid: int) -> int:
    """The peak memory of a process, its own and shared."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
