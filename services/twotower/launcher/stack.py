"""A stack: Redis, contexts, denoisers, a gateway. Started in parallel, restarted when they die, stopped in order."""

from __future__ import annotations

import asyncio
import os
import secrets
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from twotower.broker.connection import connect
from twotower.broker.environment import REDIS_VARIABLE
from twotower.launcher.config import UpConfig
from twotower.launcher.embedded_redis import EmbeddedRedis
from twotower.launcher.health import answers
from twotower.launcher.process import Say, ServiceProcess
from twotower.launcher.supervisor import Supervised, supervise
from twotower.model.checkpoint import Checkpoint, resolve_experts
from twotower.rpc.address import check_port
from twotower.tasks import end_tasks

KILL_AFTER_S = 5.0
"""Beyond the drain."""


class Stack:
    """The processes of one stack. Use `stack()`."""

    def __init__(self, config: UpConfig, say: Say, hurry: asyncio.Event) -> None:
        """`hurry`, once set, ends a drain at once."""
        self._config = config
        self._say = say
        self._hurry = hurry
        self._redis: EmbeddedRedis | None = None
        self._supervisors: list[asyncio.Task[None]] = []
        self._revision = config.revision
        self._turns_file = os.memfd_create("twotower-turns", os.MFD_CLOEXEC) if config.turns else None
        """Open to the towers as long as this process lives; nothing is left of it."""
        self.towers: list[ServiceProcess] = []
        self.gateway: ServiceProcess | None = None
        self.redis_url = config.redis_url or ""
        self.grpc_address = ""
        self.http_address = ""

    async def start(self) -> None:
        """Check what can be checked, start everything, wait until requests succeed. Raises TwoTowerError: one, and first."""
        config = self._config
        checkpoint = Checkpoint.open(config.checkpoint, context_experts=config.context_experts, revision=config.revision)
        resolve_experts(config.experts, checkpoint.config.denoiser_experts)
        if checkpoint.unsure is not None:
            self._revision = f"stack-{secrets.token_hex(8)}"
            if config.redis_url is not None:
                self._say(
                    f"[up] checkpoint {config.checkpoint} {checkpoint.unsure} so that cached prefixes in Redis are this "
                    "stack's alone; name its --revision to share and to keep them"
                )
        for port, option in ((config.grpc_port, "--grpc-port"), (config.http_port, "--http-port")):
            check_port(config.host, port, option)  # 0, any free port, tells whether the host is ours
        if config.redis_url is None:
            self._redis = EmbeddedRedis(self._say)
            await self._redis.start()
            self.redis_url = self._redis.url
        else:
            await (await connect(config.redis_url)).aclose()
        prefixes = ("--prefix-memory", config.prefix_memory, "--prefix-redis-memory", config.prefix_redis_memory)
        self.towers = [
            *(self._service("context", i, "--max-sessions", config.max_sessions, *prefixes) for i in range(config.contexts)),
            *(self._service("denoiser", i, "--slots", config.slots) for i in range(config.denoisers)),
        ]
        room = config.contexts * config.max_sessions  # what the contexts cannot hold is refused where it comes in
        ports = (
            "--max-in-flight",
            room,
            "--host",
            config.host,
            "--grpc-port",
            config.grpc_port,
            "--http-port",
            config.http_port,
        )
        self.gateway = self._process("gateway", "gateway", *self._context_experts, *ports)
        starting = [asyncio.create_task(self._start(service)) for service in (*self.towers, self.gateway)]
        try:
            *_, addresses = await asyncio.gather(*starting)
        finally:
            await end_tasks(*starting)
        self.grpc_address, self.http_address = addresses["grpc"], addresses["http"]
        # Restarted, the gateway must be where its clients know it to be.
        for option, address in (("--grpc-port", self.grpc_address), ("--http-port", self.http_address)):
            self.gateway.argv[self.gateway.argv.index(option) + 1] = address.rpartition(":")[2]
        supervised = [self._supervised(service) for service in (*self.towers, self.gateway)]
        if self._redis is not None:
            supervised.append(self._redis.supervised())
        self._supervisors = [
            asyncio.create_task(supervise(service, config.unhealthy_after_s, self._say)) for service in supervised
        ]

    async def serve(self) -> None:
        """Serve until cancelled. Services that end, or no longer answer, are started again, for as long as it takes."""
        await asyncio.gather(*self._supervisors)

    async def stop(self) -> None:
        """Drain: first the gateway, which stops taking requests and sees its own through, then the towers, then Redis."""
        await end_tasks(*self._supervisors)
        # Before the start is over there is nothing to drain, only towers that may load for a long time yet.
        grace = KILL_AFTER_S + (self._config.drain_s if self.grpc_address else 0)
        if self.gateway is not None:
            await self.gateway.stop(grace, self._hurry)
        await asyncio.gather(*(service.stop(grace, self._hurry) for service in self.towers))
        if self._redis is not None:
            await self._redis.stop()
        if self._turns_file is not None:
            os.close(self._turns_file)

    @property
    def _turns_option(self) -> tuple[str, ...]:
        return () if self._turns_file is None else ("--turns", f"/proc/{os.getpid()}/fd/{self._turns_file}")

    @property
    def _context_experts(self) -> tuple[str, str]:
        return "--context-experts", self._config.context_experts

    def _service(self, kind: str, index: int, *options: object) -> ServiceProcess:
        config = self._config
        place = ("--dtype", config.dtype, "--device", config.device, "--kernels", config.kernels)
        experts: tuple[str, ...] = ("--experts", config.experts, *self._context_experts)
        if kind == "context":
            experts = ("--experts", config.context_experts)
        memory = ("--state-memory", config.state_memory)
        trace = () if config.trace is None else ("--trace", config.trace)
        transport = ("--transport", config.transport)
        threads = ("--threads", config.tower_threads, *self._turns_option)
        return self._process(f"{kind}-{index}", kind, *place, *threads, *experts, *memory, *transport, *trace, *options)

    def _process(self, name: str, kind: str, *options: object) -> ServiceProcess:
        config = self._config
        common = ("--checkpoint", config.checkpoint, "--drain", config.drain_s)
        revision = () if self._revision is None else ("--revision", self._revision)
        debug = ("--debug",) if config.debug else ()
        argv = (sys.executable, "-m", "twotower.cli.main", *debug, kind, *common, *revision, *options)
        return ServiceProcess(name, [str(word) for word in argv], self._say, env={REDIS_VARIABLE: self.redis_url})

    async def _start(self, service: ServiceProcess) -> dict[str, str]:
        await service.start()
        return await service.wait_ready(self._config.start_s)

    def _supervised(self, service: ServiceProcess) -> Supervised:
        return Supervised(service, lambda: self._start(service), lambda timeout_s: answers(service.addresses, timeout_s))


@asynccontextmanager
async def stack(config: UpConfig, say: Say, hurry: asyncio.Event | None = None) -> AsyncIterator[Stack]:
    """A stack that serves; leaving the context drains it, at once if `hurry` is set by then, or later.

    Raises TwoTowerError if it does not start; nothing is left then.
    """
    running = Stack(config, say, hurry or asyncio.Event())
    try:
        await running.start()
        yield running
    finally:
        await asyncio.shield(running.stop())
