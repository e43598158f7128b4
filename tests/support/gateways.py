"""A whole gateway in this process, over scripted contexts: real ports, real gRPC and HTTP; only Redis is a list."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.scripted_context import ScriptedContext
from twotower.broker.registry import Replica, ReplicaKind
from twotower.client.grpc_client import GatewayClient
from twotower.gateway.config import GatewayConfig
from twotower.gateway.main import serve
from twotower.model.checkpoint import Checkpoint
from twotower.settings.build import build


class ReplicaList:
    """What the registry would say."""

    def __init__(self, denoisers: int = 1) -> None:
        self.contexts: list[Replica] = []
        self.denoisers = [replica("denoiser", f"d{i}", "127.0.0.1:1") for i in range(denoisers)]
        self.error: Exception | None = None
        self.gateways: dict[str, Replica] = {}
        self.orders: dict[str, bool] = {}

    async def replicas(self, kind: ReplicaKind) -> Sequence[Replica]:
        if self.error is not None:
            raise self.error
        return list({"context": self.contexts, "denoiser": self.denoisers, "gateway": self.gateways.values()}[kind])

    async def announce(self, replica: Replica) -> bool | None:
        self.gateways[replica.name] = replica
        return self.orders.get(replica.name)

    async def withdraw(self, replica: Replica) -> None:
        self.gateways.pop(replica.name, None)


def replica(kind: ReplicaKind, name: str, address: str, load: int = 0) -> Replica:
    return Replica(kind=kind, name=name, address=address, identity="x", load=load, capacity=64)


@dataclass
class RunningGateway:
    grpc: str
    http: str
    """Base URL."""
    replicas: ReplicaList
    stop: asyncio.Event
    task: asyncio.Task[None]

    def client(self) -> GatewayClient:
        return GatewayClient(self.grpc)


@asynccontextmanager
async def gateway(
    checkpoint: Path, *contexts: ScriptedContext, denoisers: int = 1, replicas: Sequence[Replica] = (), **settings: Any
) -> AsyncIterator[RunningGateway]:
    """Start contexts and a gateway, yield it once it is ready, stop all. `replicas`: contexts that run elsewhere."""
    known = ReplicaList(denoisers)
    known.contexts += replicas
    for i, context in enumerate(contexts):
        known.contexts.append(replica("context", f"c{i}", await context.start()))
    stop, line = asyncio.Event(), asyncio.get_running_loop().create_future()
    given = {"grpc_port": 0, "http_port": 0, "model_name": "tiny", **settings}
    config = build(GatewayConfig, checkpoint=checkpoint, redis_url="redis://unused", **given)
    task = asyncio.create_task(serve(config, Checkpoint.open(checkpoint), known, stop, line.set_result))
    try:
        await asyncio.wait((task, line), return_when=asyncio.FIRST_COMPLETED, timeout=20)
        if task.done():
            task.result()
        word, grpc, http = line.result().split()
        assert word == "ready"
        yield RunningGateway(grpc.removeprefix("grpc="), "http://" + http.removeprefix("http="), known, stop, task)
    finally:
        stop.set()
        await asyncio.wait((task,), timeout=20)
        task.result()
        for context in contexts:
            await context.stop()
