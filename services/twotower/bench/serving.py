"""The whole stack under load: real processes, real clients."""

from __future__ import annotations

import asyncio
import random
import time
from contextlib import AsyncExitStack

from twotower.bench.workload import Result, Workload
from twotower.client.grpc_client import GatewayClient
from twotower.events import Block

CLIENTS = 4
"""Connections that the requests share."""


async def closed_loop(target: str, workload: Workload, requests: int, concurrency: int) -> Result:
    """Run `requests` requests; each of `concurrency` clients sends its next request when the last one is answered.

    Throughput is measured while all clients are busy: tokens after the first client has no request left are not counted.
    Each client sends one request before, so that the costs of first use are not counted.
    """
    prompts = iter(workload.prompts(requests))

    async def client(use: GatewayClient) -> None:
        for prompt in prompts:
            await _one(use, prompt, workload, result)
        result.stop()

    async with AsyncExitStack() as stack:
        uses = [await stack.enter_async_context(GatewayClient(target)) for _ in range(min(CLIENTS, concurrency))]
        before = Result(concurrency)
        first = workload.prompts(concurrency)
        await asyncio.gather(*(_one(uses[i % len(uses)], first[i], workload, before) for i in range(concurrency)))
        result = Result(requests)
        await asyncio.gather(*(client(uses[i % len(uses)]) for i in range(concurrency)))
    return result


async def open_loop(target: str, workload: Workload, requests: int, rate: float) -> Result:
    """Send `requests` requests at random moments, `rate` a second on average, whether or not others are answered."""
    rng = random.Random(workload.seed)
    async with AsyncExitStack() as stack:
        uses = [await stack.enter_async_context(GatewayClient(target)) for _ in range(CLIENTS)]
        await _one(uses[0], workload.prompts(1)[0], workload, Result())
        result = Result(requests)
        async with asyncio.TaskGroup() as group:
            for i, prompt in enumerate(workload.prompts(requests)):
                group.create_task(_one(uses[i % CLIENTS], prompt, workload, result))
                await asyncio.sleep(rng.expovariate(rate))
        result.stop()
    return result


async def _one(use: GatewayClient, prompt: list[int], workload: Workload, result: Result) -> None:
    params, started, first = workload.params, time.perf_counter(), 0.0
    events = use.generate(
        prompt,
        max_tokens=params.max_tokens,
        block_size=params.block_size,
        steps=params.steps,
        gamma=params.gamma,
        ignore_eos=True,
    )
    async for event in events:
        if isinstance(event, Block):
            first = first or time.perf_counter() - started
            result.count(len(event.token_ids))
    result.first_block_s.append(first)
    result.latency_s.append(time.perf_counter() - started)
