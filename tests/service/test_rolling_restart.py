"""Every role of a small stack is restarted under load, one replica after the other: no request fails, and no text changes."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx

from tests.support.checkpoints import write_tiny_checkpoint
from tests.support.redis_server import embedded_redis
from tests.support.waiting import until
from twotower.broker.connection import connect
from twotower.client.grpc_client import GatewayClient
from twotower.context.config import ContextConfig
from twotower.denoiser.config import DenoiserConfig
from twotower.engine.local import LocalEngine
from twotower.events import Block
from twotower.gateway.config import GatewayConfig
from twotower.launcher.process import ServiceProcess
from twotower.reference.metrics import metric_entries
from twotower.request import GenerationParams
from twotower.settings.build import build, environment
from twotower.tasks import end_tasks

PARAMS = GenerationParams(max_tokens=96, block_size=16, steps=16, gamma=0.3)
CLIENTS = 4
LINGER_S = 3.0
START_S = 90.0


class Fleet:
    """Processes, and what clients know of the gateways: those that say they are ready."""

    def __init__(self, checkpoint: Path, redis_url: str) -> None:
        shared: dict[str, Any] = {"checkpoint": checkpoint, "redis_url": redis_url, "drain_s": 20.0}
        tower = {"threads": 1, "metrics_port": 0}
        gateway = {"grpc_port": 0, "http_port": 0, "reopen_wait_s": START_S, "linger_s": LINGER_S}
        self._configs: dict[str, object] = {
            "gateway": build(GatewayConfig, **shared, **gateway),
            "context": build(ContextConfig, **shared, **tower, prefix_redis_memory="0"),
            "denoiser": build(DenoiserConfig, **shared, **tower),
        }
        self.services: dict[str, ServiceProcess] = {}
        self.ready: dict[str, str] = {}
        """gRPC addresses of gateways, by HTTP address."""
        self.log: list[str] = []

    async def start(self, name: str) -> None:
        role = name.split("-")[0]
        argv = (sys.executable, "-m", "twotower.cli.main", role)
        self.services[name] = service = ServiceProcess(name, argv, self.log.append, env=environment(self._configs[role]))
        await service.start()
        await service.wait_ready(START_S)

    async def restart(self, name: str) -> None:
        service = self.services[name]
        await service.stop(60.0)
        assert await service.wait() == 0, "\n".join(self.log)
        await self.start(name)

    async def watch(self) -> None:
        """What a load balancer does."""
        async with httpx.AsyncClient(timeout=2.0) as client:
            while True:
                for service in list(self.services.values()):
                    if "http" not in service.addresses:
                        continue
                    http = service.addresses["http"]
                    try:
                        ready = (await client.get(f"http://{http}/readyz")).status_code == 200
                    except httpx.HTTPError:
                        ready = False
                    if ready:
                        self.ready[http] = service.addresses["grpc"]
                    else:
                        self.ready.pop(http, None)
                await asyncio.sleep(0.1)

    async def kill(self) -> None:
        await asyncio.gather(*(service.kill() for service in self.services.values()))


@asynccontextmanager
async def fleet(checkpoint: Path, redis_url: str, *names: str) -> AsyncIterator[Fleet]:
    running = Fleet(checkpoint, redis_url)
    watching = asyncio.create_task(running.watch())
    try:
        await asyncio.gather(*(running.start(name) for name in names))
        yield running
    finally:
        await end_tasks(watching)
        await running.kill()


async def test_a_rolling_restart_fails_no_request(tmp_path: Path) -> None:
    checkpoint = write_tiny_checkpoint(tmp_path / "tiny")
    local = LocalEngine(checkpoint, threads=1)
    prompts = [[5 + i, 6, 7] for i in range(CLIENTS)]
    expected = [local.generate(prompt, replace(PARAMS, seed=i)).token_ids for i, prompt in enumerate(prompts)]
    stop, done = asyncio.Event(), [0] * CLIENTS

    async def client(i: int, running: Fleet) -> None:
        turn = i
        while not stop.is_set():
            await until(lambda: running.ready)
            addresses = sorted(running.ready.values())
            turn += 1
            async with GatewayClient(addresses[turn % len(addresses)]) as gateway:
                ids: list[int] = []
                asked = gateway.generate(
                    prompts[i], max_tokens=96, block_size=16, steps=16, gamma=PARAMS.gamma, seed=i, ignore_eos=True
                )
                async for event in asked:
                    if isinstance(event, Block):
                        ids += event.token_ids
                assert ids == expected[i]
            done[i] += 1

    names = ("context-0", "context-1", "denoiser-0", "gateway-0", "gateway-1")
    async with embedded_redis() as server, fleet(checkpoint, server.url, *names) as running:
        clients = [asyncio.create_task(client(i, running)) for i in range(CLIENTS)]

        async def everyone_is_served() -> None:
            before = list(done)
            served = asyncio.create_task(until(lambda: all(map(int.__gt__, done, before)), timeout_s=START_S))
            await asyncio.wait((served, *clients), return_when=asyncio.FIRST_COMPLETED)
            for task in clients:
                if task.done():
                    task.result()  # the first request that failed
            await served

        try:
            await everyone_is_served()
            for name in names:
                await running.restart(name)
                await everyone_is_served()
            stop.set()
            await asyncio.gather(*clients)
        finally:
            await end_tasks(*clients)
        await _metrics_are_offered(running)
        assert sum("Traceback" in line for line in running.log) == 0, "\n".join(running.log)
        await asyncio.gather(*(service.stop(30.0) for service in running.services.values()))
        redis = await connect(server.url)
        left = [key async for key in redis.scan_iter() if ":replica" in key or ":order" in key]
        await redis.aclose()
        assert left == []  # each withdrew


async def _metrics_are_offered(running: Fleet) -> None:
    """At the port that each tower has logged, the names of the reference, with what was done."""
    async with httpx.AsyncClient() as client:
        for role, counter in (("context", "prompt_tokens"), ("denoiser", "generation_tokens")):
            (*_, line) = (line for line in running.log if f"[{role}-0]" in line and "metrics on " in line)
            text = (await client.get(line.rpartition(" ")[2])).text
            samples = {name: float(value) for name, value in (row.rsplit(" ", 1) for row in text.splitlines() if row[0] != "#")}
            assert samples[f"twotower_{role}_{counter}_total"] > 0
            assert samples[f"twotower_{role}_draining"] == 0
            declared = {entry.name for entry in metric_entries() if entry.module == f"{role}/metrics.py"}
            kinds = {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")}
            assert declared <= kinds
