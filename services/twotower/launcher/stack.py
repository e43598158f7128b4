"""A stack: Redis, contexts, denoisers, a gateway. Started in parallel, restarted when they die, stopped in order."""

from __future__ import annotations

import asyncio
import os
import secrets
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from twotower.broker.connection import connect
from twotower.context.config import ContextConfig
from twotower.denoiser.config import DenoiserConfig
from twotower.launcher.config import UpConfig
from twotower.launcher.embedded_redis import EmbeddedRedis
from twotower.launcher.health import answers
from twotower.launcher.process import Say, ServiceProcess
from twotower.launcher.supervisor import Supervised, supervise
from twotower.model.checkpoint import Checkpoint, resolve_experts
from twotower.rpc.address import check_port
from twotower.service.config import ServiceConfig
from twotower.settings.build import environment
from twotower.settings.sources import DEBUG_VARIABLE
from twotower.tasks import end_tasks

T = TypeVar("T", ContextConfig, DenoiserConfig)

KILL_AFTER_S = 5.0
"""Seconds after the drain's limit."""


class Stack:
    """The processes of one stack. Use `stack()`."""

    def __init__(self, config: UpConfig, say: Say, hurry: asyncio.Event) -> None:
        """`hurry`: an event that ends a drain at once."""
        self._config = config
        self._say = say
        self._hurry = hurry
        self._redis: EmbeddedRedis | None = None
        self._supervisors: list[asyncio.Task[None]] = []
        self._revision = config.gateway.service.revision
        self._turns_file = os.memfd_create("twotower-turns", os.MFD_CLOEXEC) if config.turns else None
        """The towers can open it as long as this process lives; the system then removes it."""
        self.towers: list[ServiceProcess] = []
        self.gateway: ServiceProcess | None = None
        self.redis_url = config.redis_url or ""
        self.grpc_address = ""
        self.http_address = ""

    async def start(self) -> None:
        """Check ports first, start all services, wait until requests succeed. Raises TwoTowerError: the first error only."""
        config = self._config
        path, host = config.gateway.service.checkpoint, config.gateway.service.host
        checkpoint = Checkpoint.open(
            path, context_experts=config.context.tower.experts, revision=config.gateway.service.revision
        )
        resolve_experts(config.denoiser.tower.experts, checkpoint.config.denoiser_experts)
        if checkpoint.unsure is not None:
            self._revision = f"stack-{secrets.token_hex(8)}"
            if config.redis_url is not None:
                self._say(
                    f"[up] checkpoint {path} {checkpoint.unsure} so that cached prefixes in Redis are this "
                    "stack's alone; name its --revision to share and to keep them"
                )
        for port, option in ((config.gateway.grpc_port, "--grpc-port"), (config.gateway.http_port, "--http-port")):
            check_port(host, port, option)  # port 0, any free port, shows whether the host is ours
        if config.redis_url is None:
            self._redis = EmbeddedRedis(self._say)
            await self._redis.start()
            self.redis_url = self._redis.url
        else:
            await (await connect(config.redis_url)).aclose()
        self.towers = [
            *(self._process(f"context-{i}", "context", self._tower(config.context)) for i in range(config.contexts)),
            *(self._process(f"denoiser-{i}", "denoiser", self._tower(config.denoiser)) for i in range(config.denoisers)),
        ]
        gateway = replace(config.gateway, service=self._service(config.gateway.service))
        self.gateway = self._process("gateway", "gateway", gateway)
        starting = [asyncio.create_task(self._start(service)) for service in (*self.towers, self.gateway)]
        try:
            *_, addresses = await asyncio.gather(*starting)
        finally:
            await end_tasks(*starting)
        self.grpc_address, self.http_address = addresses["grpc"], addresses["http"]
        # A restarted gateway must keep the addresses that its clients know.
        gateway = replace(gateway, grpc_port=_port(self.grpc_address), http_port=_port(self.http_address))
        self.gateway.env = self._environment(gateway)
        supervised = [self._supervised(service) for service in (*self.towers, self.gateway)]
        if self._redis is not None:
            supervised.append(self._redis.supervised())
        self._supervisors = [
            asyncio.create_task(supervise(service, config.unhealthy_after_s, self._say)) for service in supervised
        ]

    async def serve(self) -> None:
        """Serve until cancelled. Services that end or no longer answer are restarted, however often that is needed."""
        await asyncio.gather(*self._supervisors)

    async def stop(self) -> None:
        """Drain: first the gateway, which refuses new requests and finishes its own, then the towers, then Redis."""
        await end_tasks(*self._supervisors)
        # Before the start is complete there is nothing to drain, only towers that may go on loading for long.
        grace = KILL_AFTER_S + (self._config.gateway.service.drain_s if self.grpc_address else 0)
        if self.gateway is not None:
            await self.gateway.stop(grace, self._hurry)
        await asyncio.gather(*(service.stop(grace, self._hurry) for service in self.towers))
        if self._redis is not None:
            await self._redis.stop()
        if self._turns_file is not None:
            os.close(self._turns_file)

    def _tower(self, config: T) -> T:
        turns = None if self._turns_file is None else Path(f"/proc/{os.getpid()}/fd/{self._turns_file}")
        return replace(config, service=self._service(config.service), tower=replace(config.tower, turns=turns))

    def _service(self, config: ServiceConfig) -> ServiceConfig:
        return replace(config, redis_url=self.redis_url, revision=self._revision)

    def _process(self, name: str, command: str, config: object) -> ServiceProcess:
        argv = (sys.executable, "-m", "twotower.cli.main", command)
        return ServiceProcess(name, argv, self._say, env=self._environment(config))

    def _environment(self, config: object) -> dict[str, str]:
        """A service's settings as variables: every user of the machine can read a command line, and passwords on it."""
        return {**environment(config), **({DEBUG_VARIABLE: "true"} if self._config.debug else {})}

    async def _start(self, service: ServiceProcess) -> dict[str, str]:
        await service.start()
        return await service.wait_ready(self._config.start_s)

    def _supervised(self, service: ServiceProcess) -> Supervised:
        return Supervised(service, lambda: self._start(service), lambda timeout_s: answers(service.addresses, timeout_s))


def _port(address: str) -> int:
    return int(address.rpartition(":")[2])


@asynccontextmanager
async def stack(config: UpConfig, say: Say, hurry: asyncio.Event | None = None) -> AsyncIterator[Stack]:
    """A stack that serves; the end of the context drains it. `hurry` ends the drain at once, whenever it is set.

    Raises TwoTowerError if the stack does not start; no process is left then.
    """
    running = Stack(config, say, hurry or asyncio.Event())
    try:
        await running.start()
        yield running
    finally:
        await asyncio.shield(running.stop())
