"""Process of a denoiser worker: load, announce, pull, drain."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Sequence

from twotower.broker.connection import connect
from twotower.broker.heartbeat import heartbeat
from twotower.broker.ready_queue import ReadyQueue
from twotower.broker.registry import Registry, Replica
from twotower.denoiser.config import DenoiserConfig
from twotower.denoiser.loop import DenoiserLoop
from twotower.denoiser.messages import DenoiserResult
from twotower.denoiser.worker import Worker
from twotower.engine.denoiser_engine import DenoiserEngine
from twotower.engine.graphs import batch_buckets, token_buckets
from twotower.engine.pacing import Pacing, SharedPacing
from twotower.engine.progress import Progress
from twotower.engine.thread import EngineThread
from twotower.engine.turns import Turns
from twotower.garbage import spare_what_is_loaded
from twotower.model.checkpoint import Checkpoint
from twotower.model.denoiser_tower import DenoiserTower
from twotower.model.memory import state_budget
from twotower.model.pool import PAGE, PoolSize, StatePool
from twotower.model.state import ContextState
from twotower.model.weights import load_denoiser_tower, resolve_device, resolve_dtype
from twotower.request import GenerationParams
from twotower.rpc.server import RpcServer
from twotower.rpc.signals import stop_requested
from twotower.tasks import delivered_to, end_tasks, until_stopped
from twotower.tracing.recorder import recording
from twotower.transport.config import TransportConfig
from twotower.transport.ends import WorkerTransports

log = logging.getLogger(__name__)


async def run(config: DenoiserConfig) -> None:
    """Work until SIGTERM, then hand sessions back. Raises CheckpointError, ConfigError, BrokerUnavailable before it works."""
    stop = stop_requested()
    checkpoint = Checkpoint.open_shared(
        config.service.checkpoint, ("denoiser",), context_experts=config.context_experts, revision=config.service.revision
    )
    device = resolve_device(config.tower.device)
    turns = Turns(config.tower.turns if device.type == "cpu" else None)
    redis = await connect(config.service.redis_url)
    thread = EngineThread("denoiser-engine", config.tower.threads, pinned=turns.shared)
    try:
        place = resolve_dtype(config.tower.dtype, checkpoint), device
        tower = await thread.run(
            load_denoiser_tower, checkpoint, *place, experts=config.tower.experts, kernels=config.tower.kernels
        )
        engine = DenoiserEngine(tower)
        await thread.run(_warm_up, engine)
        pool = StatePool(tower.config, tower.dtype, tower.device, _pool_size(config, checkpoint, tower))
        log.debug("state memory: %d slots, %d pages", pool.size.slots, pool.size.pages)
        tokens = min(checkpoint.limits.max_context, pool.size.pages * PAGE)
        contexts, batches = token_buckets(tokens), batch_buckets(pool.size.slots)
        warm = await thread.run(lambda: engine.warm_up(pool, batches=batches, contexts=contexts))
        if warm.sizes:
            log.info("warm: %s", warm)
        queue, registry = ReadyQueue(redis, checkpoint.identity), Registry(redis, checkpoint.identity)
        worker_id = f"{socket.gethostname()}-{os.getpid()}"
        with recording(config.tower.trace, f"denoiser-{os.getpid()}") as tracer:
            progress = Progress(config.tower.stall_s)

            def take(results: Sequence[DenoiserResult]) -> None:
                worker.take(results)

            loop = DenoiserLoop(
                engine,
                pool,
                delivered_to(take),
                progress=progress,
                pacing=SharedPacing(turns) if turns.shared else Pacing(),
                tracer=tracer,
            )
            transports = WorkerTransports(TransportConfig.of(config.tower.transport), tower.device)
            worker: Worker = Worker(checkpoint, loop, queue, worker_id, pool, transports, progress, tracer)
            working, guarding = asyncio.create_task(thread.run(loop.run)), asyncio.create_task(progress.guard())
            try:
                await _work(config, checkpoint, worker, registry, stop, working)
            finally:
                loop.inbox.put(None)
                transports.close()
            await working
            await end_tasks(guarding)
            log.info("drained: %d slots and %d pages in use", pool.used_slots, pool.used_pages)
    finally:
        thread.close()
        turns.close()
        await redis.aclose()


async def _work(
    config: DenoiserConfig,
    checkpoint: Checkpoint,
    worker: Worker,
    registry: Registry,
    stop: asyncio.Event,
    working: asyncio.Task[None],
) -> None:
    server = RpcServer(config.service.host, config.port)
    await server.start([])

    def describe() -> Replica:
        return Replica(
            kind="denoiser",
            name=worker.id,
            address=server.address,
            identity=checkpoint.identity,
            load=worker.load,
            capacity=worker.slots,
        )

    await registry.announce(describe())
    pulling, *others = (
        asyncio.create_task(work) for work in (worker.pull(), worker.flush(), heartbeat(registry, describe), server.watch())
    )
    await server.set_serving(True)
    spare_what_is_loaded()
    print(f"ready grpc={server.address}", flush=True)
    drain_s = 0.0
    try:
        await until_stopped(stop, working, pulling, *others)
        drain_s = config.service.drain_s
        log.info("draining %d sessions", worker.load)
    finally:  # a loop that has failed leaves sessions behind, which the context gives to others as soon as they are let go
        await server.set_serving(False)
        await end_tasks(pulling, *others)
        with contextlib.suppress(Exception):
            await registry.withdraw(describe())
        await worker.drain(drain_s, working)
        await server.stop(0.5)


def _pool_size(config: DenoiserConfig, checkpoint: Checkpoint, tower: DenoiserTower) -> PoolSize:
    limits = checkpoint.limits
    return PoolSize.within(
        tower.config,
        tower.dtype,
        state_budget(config.tower.state_memory, tower.device),
        max_slots=config.slots,
        max_tokens=limits.max_context,
        row_bytes=2 * 4 * limits.block_size * tower.config.vocab_size,  # logits in fp32, and what unmasking makes of them
    )


def _warm_up(engine: DenoiserEngine) -> None:
    """One forward, so that the first request does not pay for first-use costs."""
    config, tower = engine.tower.config, engine.tower
    state = ContextState.alone(config, tower.dtype, tower.device)
    engine.step([engine.start(GenerationParams(block_size=config.block_size), state, 0)])
