"""Process of the context service: load, announce, serve, drain."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from prometheus_client import CollectorRegistry

from twotower.broker.connection import connect
from twotower.broker.heartbeat import heartbeat
from twotower.broker.registry import Registry, Replica
from twotower.context.config import ContextConfig
from twotower.context.loop import ContextLoop
from twotower.context.messages import ContextResult
from twotower.context.metrics import ContextMetrics, ContextState
from twotower.context.prefixes import PrefixCache
from twotower.context.scoring import ScoringService
from twotower.context.service import ContextService
from twotower.context.sessions import Sessions
from twotower.engine.context_engine import ContextEngine
from twotower.engine.pacing import ContextPacing, Outbound, Pacing
from twotower.engine.progress import Progress
from twotower.garbage import freeze_loaded_objects
from twotower.internal.v1 import context_pb2, context_pb2_grpc, scoring_pb2_grpc
from twotower.model.checkpoint import Checkpoint
from twotower.model.memory import prefix_budget, state_budget
from twotower.model.pool import StatePool
from twotower.model.weights import load_context_tower
from twotower.prefix.chain import ChainSpec
from twotower.prefix.metrics import PrefixMetrics
from twotower.prefix.redis_tier import RedisTier, RedisTierConfig
from twotower.prefix.stats import PrefixStats, TierStats
from twotower.request import GenerationParams
from twotower.rpc.server import RpcServer
from twotower.rpc.signals import stop_requested
from twotower.service.drain import Drain
from twotower.service.gpu_metrics import offer_gpu_metrics
from twotower.service.metrics_port import metrics_port
from twotower.service.tower import TowerKind, tower_process
from twotower.sizes import parse_bytes
from twotower.tasks import delivered_to, end_tasks, until_stopped
from twotower.tracing.recorder import recording
from twotower.transport.config import TransportConfig
from twotower.transport.ends import ContextTransports

log = logging.getLogger(__name__)

SERVICE_NAME = context_pb2.DESCRIPTOR.services_by_name["ContextTower"].full_name


async def run(config: ContextConfig) -> None:
    """Serve until SIGTERM, then drain. Raises CheckpointError, ConfigError, BrokerUnavailable before it serves."""
    stop = stop_requested()
    kind = TowerKind(
        name="context",
        load=load_context_tower,
        engine=ContextEngine,
        first_use=_first_use,
        row_positions=lambda checkpoint: 1,  # in AR mode
    )
    tower = tower_process(kind, config.service, config.tower, context_experts=config.tower.experts, slots=config.max_sessions)
    metrics = ContextMetrics(CollectorRegistry())
    async with tower as process, _prefixes(config, process.checkpoint, process.engine, metrics.registry) as prefixes:
        with recording(config.tower.trace, f"context-{os.getpid()}") as tracer:
            pool, turns = process.pool, process.turns
            progress, outbound = Progress(config.tower.stall_s), Outbound()

            def take(results: Sequence[ContextResult]) -> None:
                sessions.take(results)

            loop = ContextLoop(
                process.engine,
                pool,
                prefixes,
                delivered_to(take),
                chunk=config.prefill_chunk,
                budget=config.prefill_budget,
                max_waiting=config.max_waiting,
                progress=progress,
                pacing=ContextPacing(turns, outbound) if turns.shared else Pacing(),
                outbound=outbound,
                tracer=tracer,
            )
            sessions: Sessions = Sessions(loop, process.queue, prefixes.redis, metrics)
            chosen = TransportConfig.of(config.tower.transport)
            transports = ContextTransports(chosen, config.service.host, process.tower.device)
            service = ContextService(
                process.checkpoint, sessions, pool, transports, tracer, config.silence_s, paced=turns.shared
            )
            ContextState(
                metrics,
                running=lambda: len(sessions),
                unread=lambda: len(sessions.unread),
                queued=lambda: len(sessions.queued),
                slots=pool.size.slots,
                used_slots=lambda: pool.used_slots,
                pages=pool.size.pages,
                used_pages=lambda: pool.used_pages,
                forwards=lambda: progress.forwards,
                draining=lambda: service.draining,
            )
            offer_gpu_metrics(process.tower.device, metrics.registry)
            scoring = ScoringService(loop.inbox, process.checkpoint.limits, pool, lambda: service.draining)
            async with process.working(loop, progress) as working:
                try:
                    with metrics_port(config.service.host, config.metrics_port, metrics.registry):
                        await _serve(config, service, scoring, pool, prefixes, process.registry, stop, working)
                finally:
                    loop.inbox.put(None)
                    transports.close()
                    await asyncio.wait((working,))
                    await sessions.close()


async def _serve(
    config: ContextConfig,
    service: ContextService,
    scoring: ScoringService,
    pool: StatePool,
    prefixes: PrefixCache,
    registry: Registry,
    stop: asyncio.Event,
    working: asyncio.Task[None],
) -> None:
    server, sessions = RpcServer(config.service.host, config.port), service.sessions
    context_pb2_grpc.add_ContextTowerServicer_to_server(service, server.server)
    scoring_pb2_grpc.add_ScoringServicer_to_server(scoring, server.server)
    await server.start([SERVICE_NAME])
    # Known once the port is bound; every queued session names it.
    sessions.address = address = config.advertise or server.address

    def describe() -> Replica:
        now, queued, unread = asyncio.get_running_loop().time(), sessions.queued, sessions.unread
        return Replica(
            kind="context",
            name=address,
            address=address,
            identity=prefixes.spec.identity,
            load=len(sessions),
            capacity=0 if service.draining else pool.size.slots,
            dtype=prefixes.spec.dtype,
            chunk_tokens=prefixes.spec.chunk_tokens if prefixes.enabled else 0,
            prefixes=prefixes.announced(),
            draining=service.draining,
            waiting=len(queued),
            oldest_s=max((now - live.waiting_since for live in queued), default=0.0),
            unread=len(unread),
            unread_s=max((now - live.opened for live in unread), default=0.0),
            leaving_per_s=sessions.metrics.leaving_per_s,
        )

    def drain_or_not(draining: bool) -> None:
        service.draining = draining

    drain = Drain(
        begin=lambda: drain_or_not(True),
        call_off=lambda: drain_or_not(False),
        load=lambda: len(sessions),
        set_serving=server.set_serving,
    )

    await registry.announce(describe())
    watching = sessions.watch_queue(), heartbeat(registry, describe, drain.obey), server.watch()
    tasks = [asyncio.create_task(work) for work in watching]
    await server.set_serving(True)
    freeze_loaded_objects()
    print(f"ready grpc={server.address}", flush=True)
    drain_s = 0.0
    try:
        await until_stopped(stop, working, *tasks)
        drain_s = config.service.drain_s
    finally:  # a loop that has failed leaves sessions behind, which go on elsewhere as soon as they are let go
        await drain.begin()
        with contextlib.suppress(Exception):
            await registry.announce(describe())  # at once, so that nobody opens more
        emptied = asyncio.create_task(sessions.empty.wait())
        await asyncio.wait((emptied, working), timeout=drain_s, return_when=asyncio.FIRST_COMPLETED)
        await end_tasks(emptied)
        sessions.let_go()  # those that the time was too short for
        await drain.report()
        await server.stop(0.5 if drain_s else 0.0)
        await end_tasks(*tasks)
        with contextlib.suppress(Exception):
            await registry.withdraw(describe())


@asynccontextmanager
async def _prefixes(
    config: ContextConfig, checkpoint: Checkpoint, engine: ContextEngine, metrics: CollectorRegistry
) -> AsyncIterator[PrefixCache]:
    """The prefix cache in both of its tiers, and its metrics."""
    tower = engine.tower
    budget = prefix_budget(config.prefix_memory, state_budget(config.tower.state_memory, tower.device))
    in_redis = 0 if config.prefix_redis_memory == "0" else parse_bytes(config.prefix_redis_memory, "prefix_redis_memory")
    spec = ChainSpec(checkpoint.identity, str(tower.dtype).removeprefix("torch."), config.prefill_chunk)
    redis = await connect(config.service.redis_url, decode=False) if in_redis else None
    try:
        tier = None
        if redis is not None:
            tier = RedisTier(redis, spec, tower.config, tower.dtype, RedisTierConfig(max_bytes=in_redis), TierStats())
        cache = PrefixCache(spec, budget, engine.decay_rates, tier)
        PrefixMetrics(PrefixStats(cache.tiers), metrics)
        yield cache
        if tier is not None:
            await tier.close()
    finally:
        if redis is not None:
            await redis.aclose()


def _first_use(engine: ContextEngine) -> None:
    """One prefill and one commit, so that the first request does not pay for first-use costs."""
    params = GenerationParams(block_size=engine.tower.config.block_size)
    session = engine.open("warm-up", [0, 0], params)
    engine.prefill(session, 2)
    engine.commit([(session, [0] * params.block_size)])
