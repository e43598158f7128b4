"""Process of a denoiser worker: load, announce, pull, drain."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Sequence

from prometheus_client import CollectorRegistry

from twotower.broker.heartbeat import heartbeat
from twotower.broker.registry import Registry, Replica
from twotower.denoiser.config import DenoiserConfig
from twotower.denoiser.loop import DenoiserLoop
from twotower.denoiser.messages import DenoiserResult
from twotower.denoiser.metrics import DenoiserMetrics, DenoiserState
from twotower.denoiser.worker import Worker
from twotower.engine.denoiser_engine import DenoiserEngine
from twotower.engine.pacing import Pacing, SharedPacing
from twotower.engine.progress import Progress
from twotower.garbage import freeze_loaded_objects
from twotower.model.checkpoint import Checkpoint
from twotower.model.state import ContextState
from twotower.model.weights import load_denoiser_tower
from twotower.request import GenerationParams
from twotower.rpc.server import RpcServer
from twotower.rpc.signals import stop_requested
from twotower.service.drain import Drain
from twotower.service.gpu_metrics import offer_gpu_metrics
from twotower.service.metrics_port import metrics_port
from twotower.service.tower import TowerKind, tower_process
from twotower.tasks import delivered_to, end_tasks, until_stopped
from twotower.tracing.recorder import recording
from twotower.transport.config import TransportConfig
from twotower.transport.ends import WorkerTransports

log = logging.getLogger(__name__)


async def run(config: DenoiserConfig) -> None:
    """Work until SIGTERM, then hand sessions back. Raises CheckpointError, ConfigError, BrokerUnavailable before it works."""
    stop = stop_requested()
    kind = TowerKind(
        name="denoiser",
        load=load_denoiser_tower,
        engine=DenoiserEngine,
        first_use=_first_use,
        row_positions=lambda checkpoint: checkpoint.limits.block_size,
    )
    tower = tower_process(kind, config.service, config.tower, context_experts=config.context_experts, slots=config.slots)
    worker_id = f"{socket.gethostname()}-{os.getpid()}"
    async with tower as process:
        with recording(config.tower.trace, f"denoiser-{os.getpid()}") as tracer:
            pool, turns, progress = process.pool, process.turns, Progress(config.tower.stall_s)

            def take(results: Sequence[DenoiserResult]) -> None:
                worker.take(results)

            loop = DenoiserLoop(
                process.engine,
                pool,
                delivered_to(take),
                progress=progress,
                pacing=SharedPacing(turns) if turns.shared else Pacing(),
                tracer=tracer,
            )
            transports = WorkerTransports(TransportConfig.of(config.tower.transport), process.tower.device)
            metrics = DenoiserMetrics(CollectorRegistry())
            worker: Worker = Worker(
                process.checkpoint, loop, process.queue, worker_id, pool, transports, progress, tracer, metrics=metrics
            )
            DenoiserState(
                metrics,
                running=lambda: worker.load,
                refining=lambda: worker.refining,
                slots=worker.slots,
                pages=pool.size.pages,
                used_pages=lambda: pool.used_pages,
                forwards=lambda: progress.forwards,
                draining=lambda: worker.draining,
            )
            offer_gpu_metrics(process.tower.device, metrics.registry)
            offered = metrics_port(config.service.host, config.metrics_port, metrics.registry)
            async with process.working(loop, progress) as working:
                try:
                    with offered:
                        await _work(config, process.checkpoint, worker, process.registry, stop, working)
                finally:
                    loop.inbox.put(None)
                    transports.close()


async def _work(
    config: DenoiserConfig,
    checkpoint: Checkpoint,
    worker: Worker,
    registry: Registry,
    stop: asyncio.Event,
    working: asyncio.Task[None],
) -> None:
    metrics, server = worker.metrics, RpcServer(config.service.host, config.port)
    await server.start([])

    def describe() -> Replica:
        return Replica(
            kind="denoiser",
            name=worker.id,
            address=server.address,
            identity=checkpoint.identity,
            load=worker.load,
            capacity=0 if worker.draining else worker.slots,
            draining=worker.draining,
            leaving_per_s=metrics.leaving_per_s,
            refining=worker.refining,
            refine_s=metrics.refine_s.value,
            commit_s=metrics.commit_s.value,
            tokens_per_forward=metrics.tokens_per_forward,
            sick=metrics.sick,
        )

    drain = Drain(begin=worker.begin_drain, call_off=worker.call_off, load=lambda: worker.load, set_serving=server.set_serving)

    await registry.announce(describe())
    alive, pulling, *others = (
        asyncio.create_task(work)
        for work in (heartbeat(registry, describe, drain.obey), worker.pull(), worker.flush(), server.watch())
    )
    await server.set_serving(True)
    freeze_loaded_objects()
    print(f"ready grpc={server.address}", flush=True)
    drain_s = 0.0
    try:
        await until_stopped(stop, working, alive, pulling, *others)
        drain_s = config.service.drain_s
    finally:  # a loop that has failed leaves sessions behind, which the context gives to others as soon as they are let go
        await drain.begin()
        await end_tasks(pulling, *others)
        with contextlib.suppress(Exception):
            await registry.announce(describe())  # at once, so that nobody counts on it
        await worker.drain(drain_s, working)
        await drain.report()
        await end_tasks(alive)
        with contextlib.suppress(Exception):
            await registry.withdraw(describe())
        await server.stop(0.5)


def _first_use(engine: DenoiserEngine) -> None:
    """One forward, so that the first request does not pay for first-use costs."""
    config, tower = engine.tower.config, engine.tower
    state = ContextState.alone(config, tower.dtype, tower.device)
    engine.step([engine.start(GenerationParams(block_size=config.block_size), state, 0)])
