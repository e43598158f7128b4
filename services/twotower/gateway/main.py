"""The gateway service: from settings to serving, and back out."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import sys
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import Protocol

from prometheus_client import CollectorRegistry

from twotower.broker.connection import connect
from twotower.broker.heartbeat import Announcer, heartbeat
from twotower.broker.registry import Registry, Replica, ReplicaKind
from twotower.errors import BrokerUnavailable
from twotower.garbage import freeze_loaded_objects, return_large_blocks
from twotower.gateway.bodies import ID_BYTES, Bodies, body_limits
from twotower.gateway.brain import Brain
from twotower.gateway.config import GatewayConfig
from twotower.gateway.core import Core, ServedModel
from twotower.gateway.grpc_face import SERVICE_NAME, InferenceService, max_message_bytes
from twotower.gateway.http_face import make_app
from twotower.gateway.http_server import HttpServer
from twotower.gateway.metrics import Metrics
from twotower.gateway.replicas import ReplicaPool, ReplicaSource
from twotower.gateway.scoring import Scorer
from twotower.model.checkpoint import Checkpoint
from twotower.rpc.files import allow_many_files
from twotower.rpc.server import RpcServer
from twotower.rpc.signals import stop_requested
from twotower.service.drain import Drain
from twotower.tasks import end_tasks, until_stopped
from twotower.text.chat_template import ChatTemplate
from twotower.text.tokenizer import Tokenizer
from twotower.v1 import inference_pb2_grpc

log = logging.getLogger(__name__)

SWITCH_S = 0.001
"""How soon a thread that reads a request makes way for the streams of others. (Python's default is 5 ms.)"""

OTHER_CALLS = 256
"""Calls at once beside those that generate: they ask for the model, or wait to be refused."""

MAX_STREAMS = 128
"""Calls at once on one gRPC connection."""

FLUSH_S = 1.0
"""After the drain: for last bytes to leave."""


class GatewayRegistry(ReplicaSource, Announcer, Protocol):
    """What is needed of `broker.registry.Registry`."""

    async def withdraw(self, replica: Replica) -> None:
        """This gateway takes no more requests. Raises BrokerUnavailable."""
        ...


async def run(config: GatewayConfig) -> None:
    """Serve until SIGTERM or SIGINT, then drain. Prints one `ready` line once requests will succeed.

    Raises TwoTowerError for what cannot be started.
    """
    stop = stop_requested()
    sys.setswitchinterval(SWITCH_S)
    return_large_blocks()
    allow_many_files()  # each HTTP client has a connection of its own
    service = config.service
    checkpoint = Checkpoint.open_shared(service.checkpoint, context_experts=config.context_experts, revision=service.revision)
    redis = await connect(service.redis_url)
    try:
        replicas = Registry(redis, checkpoint.identity)
        await serve(config, checkpoint, replicas, stop, lambda line: print(line, flush=True))
    finally:
        await redis.aclose()


async def serve(
    config: GatewayConfig,
    checkpoint: Checkpoint,
    replicas: GatewayRegistry,
    stop: asyncio.Event,
    announce: Callable[[str], None],
) -> None:
    """Serve until `stop`, then drain; `announce` is given the `ready` line. Raises TwoTowerError."""
    tokenizer = Tokenizer.load(checkpoint.tokenizer_path) if checkpoint.tokenizer_path else None
    chat = ChatTemplate.load(checkpoint.path) if tokenizer else None
    model = ServedModel(config.served_name, checkpoint.identity, checkpoint.limits, tokenizer, int(time.time()), chat)
    metrics = Metrics(CollectorRegistry())
    async with AsyncExitStack() as stack:
        pool = ReplicaPool(replicas, config.snapshot_keep_s, time.monotonic)
        stack.push_async_callback(pool.close)
        least: dict[ReplicaKind, int] = {"context": config.min_contexts, "denoiser": config.min_denoisers}
        core = Core(
            model,
            pool,
            metrics,
            max_in_flight=config.max_in_flight,
            reopen_wait_s=config.reopen_wait_s,
            ar_fallback=config.ar_fallback,
            from_zero=[kind for kind, count in least.items() if count == 0],
        )
        brain = Brain(config.scaling)
        stack.callback(core.close)
        token_bytes = ID_BYTES if tokenizer is None else tokenizer.max_token_bytes
        limits = body_limits(config.max_body_bytes, config.max_bodies_bytes, model.limits.max_context, token_bytes)
        bodies = Bodies(*limits)
        app = make_app(core, bodies, brain, Scorer(pool, metrics), config.cors_origins)
        http = HttpServer(app, config.service.host, config.http_port, "--http-port")
        stack.push_async_callback(http.stop, FLUSH_S)
        rpc = RpcServer(
            config.service.host,
            config.grpc_port,
            "--grpc-port",
            max_calls=config.max_in_flight + OTHER_CALLS,
            max_streams=MAX_STREAMS,
            max_message_bytes=max_message_bytes(model),
        )
        inference_pb2_grpc.add_InferenceServicer_to_server(InferenceService(core), rpc.server)
        await rpc.start([SERVICE_NAME])
        stack.push_async_callback(rpc.stop, FLUSH_S)
        await http.start()

        ready = asyncio.Event()
        watch = asyncio.create_task(pool.watch(_Readiness(core, pool, metrics, rpc, ready, brain)))
        own_port = asyncio.create_task(rpc.watch())
        name, drain = f"{socket.gethostname()}-{os.getpid()}", _drain(core, rpc)

        def describe() -> Replica:
            return _described(core, name, checkpoint.identity, rpc.address)

        alive = asyncio.create_task(heartbeat(replicas, describe, drain.obey))
        stack.push_async_callback(end_tasks, watch, own_port, alive)
        was_ready = await _first(ready, stop, watch, own_port, alive)
        if was_ready:
            freeze_loaded_objects()
            announce(f"ready grpc={rpc.address} http={http.address}")
            await until_stopped(stop, watch, own_port, alive)
            await drain.begin()
            await asyncio.sleep(config.linger_s)
        core.refuse()
        await rpc.set_serving(False)
        await end_tasks(watch)
        await core.drain(config.service.drain_s)
        await drain.report()
        await end_tasks(alive)
        with contextlib.suppress(BrokerUnavailable):
            await replicas.withdraw(describe())


def _drain(core: Core, rpc: RpcServer) -> Drain:
    """A gateway that drains takes what comes nonetheless: whoever sends it has not noticed yet."""

    def leave(leaving: bool) -> None:
        core.leaving = leaving

    return Drain(
        begin=lambda: leave(True),
        call_off=lambda: leave(False),
        load=lambda: core.in_flight,
        set_serving=lambda serving: rpc.set_serving(serving and core.why_not_ready() is None),
    )


def _described(core: Core, name: str, identity: str, address: str) -> Replica:
    for_denoiser, for_context = core.held_for_denoiser, core.held_for_context
    return Replica(
        kind="gateway",
        name=name,
        address=address,
        identity=identity,
        load=core.in_flight,
        capacity=0 if core.leaving else core.max_in_flight,
        draining=core.leaving,
        waiting=len(for_denoiser),
        oldest_s=for_denoiser.oldest_s(),
        unread=len(for_context),
        unread_s=for_context.oldest_s(),
    )


class _Readiness:
    """Tells health, metrics and the brain what each refresh of the replicas found."""

    def __init__(
        self, core: Core, pool: ReplicaPool, metrics: Metrics, rpc: RpcServer, ready: asyncio.Event, brain: Brain
    ) -> None:
        self._core = core
        self._pool = pool
        self._metrics = metrics
        self._rpc = rpc
        self._ready = ready
        self._brain = brain
        self._reason: str | None = "not yet looked"

    async def __call__(self) -> None:
        """The replicas were refreshed."""
        self._metrics.contexts.set(self._pool.contexts)
        self._metrics.denoisers.set(self._pool.denoisers)
        self._metrics.held.labels("context").set(len(self._core.held_for_context))
        self._metrics.held.labels("denoiser").set(len(self._core.held_for_denoiser))
        if not self._pool.away:  # who does not answer says nothing about need: what was wanted is wanted
            decision = self._brain.look(self._pool.snapshot)
            self._metrics.denoisers_wanted.set(decision.denoisers.count)
            self._metrics.contexts_wanted.set(decision.contexts.count)
        reason = self._core.why_not_ready()
        if reason == self._reason:
            return
        self._reason = reason
        log.info("ready" if reason is None else "not ready: %s", *(() if reason is None else (reason,)))
        await self._rpc.set_serving(reason is None)
        if reason is None:
            self._ready.set()


async def _first(ready: asyncio.Event, stop: asyncio.Event, *tasks: asyncio.Task[None]) -> bool:
    """Wait for either; whether it was `ready`. Raises what a task raises meanwhile."""
    either = asyncio.Event()
    waits = [asyncio.create_task(event.wait()) for event in (ready, stop)]
    for wait in waits:
        wait.add_done_callback(lambda _: either.set())
    try:
        await until_stopped(either, *tasks)
    finally:
        await end_tasks(*waits)
    return ready.is_set()
