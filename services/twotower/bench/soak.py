"""A stack at full load for a long time: no memory may grow, no block may be lost, and texts must equal single requests'."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path

from twotower.bench.workload import Workload
from twotower.client.grpc_client import GatewayClient
from twotower.engine.local import LocalEngine
from twotower.events import Block, Finished
from twotower.request import GenerationParams

CLIENTS = 4
SAMPLE_S = 5.0


@dataclass(slots=True)
class Soak:
    """The results of a soak."""

    requests: int = 0
    tokens: int = 0
    wrong: int = 0
    """Texts that differ from those of single requests, or whose blocks are not numbered 0, 1, 2 ..."""
    failed: int = 0
    seconds: float = 0.0
    memory: list[dict[str, float]] = field(default_factory=list)
    """Memory of every process in MB, every `SAMPLE_S`."""

    def growth(self) -> dict[str, float]:
        """The memory growth of every process: the mean of the last quarter of its samples over that of the second."""
        quarter = len(self.memory) // 4
        if quarter == 0:
            return {}
        early, late = self.memory[quarter : 2 * quarter], self.memory[-quarter:]
        return {name: sum(s[name] for s in late) / sum(s[name] for s in early) for name in self.memory[-1]}


def expected_texts(
    checkpoint: Path, workload: Workload, prompts: int, *, dtype: str, threads: int, kernels: str
) -> list[list[int]]:
    """The tokens of each prompt, run alone in one process."""
    engine = LocalEngine(checkpoint, dtype=dtype, device="cpu", threads=threads, kernels=kernels)
    seeds = enumerate(workload.prompts(prompts))
    return [engine.generate(prompt, _params(workload, i)).token_ids for i, prompt in seeds]


async def soak(
    target: str,
    workload: Workload,
    expected: Sequence[Sequence[int]],
    *,
    seconds: float,
    concurrency: int,
    pids: dict[str, int],
    report: Callable[[Soak], None],
) -> Soak:
    """Run `concurrency` clients that send all prompts in turn, again and again. `pids`: processes whose memory is watched."""
    prompts, turns, result = workload.prompts(len(expected)), itertools.count(), Soak()
    started = time.perf_counter()

    async def client(use: GatewayClient) -> None:
        while time.perf_counter() - started < seconds:
            i = next(turns) % len(prompts)
            try:
                tokens = await _one(use, prompts[i], workload, i)
            except Exception:
                result.failed += 1
                continue
            result.requests += 1
            result.tokens += len(tokens or ())
            result.wrong += tokens != expected[i]

    async def watch() -> None:
        while True:
            result.seconds = time.perf_counter() - started
            result.memory.append({name: resident_mb(pid) for name, pid in pids.items()})
            report(result)
            await asyncio.sleep(SAMPLE_S)

    async with AsyncExitStack() as stack:
        uses = [await stack.enter_async_context(GatewayClient(target)) for _ in range(min(CLIENTS, concurrency))]
        watching = asyncio.create_task(watch())
        try:
            await asyncio.gather(*(client(uses[i % len(uses)]) for i in range(concurrency)))
        finally:
            watching.cancel()
    result.seconds = time.perf_counter() - started
    return result


def resident_mb(pid: int) -> float:
    """A process's resident memory, its own and shared, in MB; 0 once it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS:")), 0.0)


async def _one(use: GatewayClient, prompt: list[int], workload: Workload, seed: int) -> list[int] | None:
    """The tokens of one request; None if a block was lost or came twice."""
    params, blocks = _params(workload, seed), 0
    tokens: list[int] = []
    async for event in use.generate(
        prompt,
        max_tokens=params.max_tokens,
        block_size=params.block_size,
        steps=params.steps,
        gamma=params.gamma,
        temperature=params.temperature,
        seed=params.seed,
        ignore_eos=True,
    ):
        if isinstance(event, Block):
            if event.index != blocks:
                return None
            blocks += 1
            tokens += event.token_ids
        elif isinstance(event, Finished) and (event.blocks, event.completion_tokens) != (blocks, len(tokens)):
            return None
    return tokens


def _params(workload: Workload, seed: int) -> GenerationParams:
    """Parameters of a prompt; every second prompt is drawn at random, so that seeds are tested, too."""
    return dataclasses.replace(workload.params, gamma=0.8, temperature=0.7 * (seed % 2), seed=seed)
