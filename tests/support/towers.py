"""A context service and denoiser workers in the test's own process: real gRPC, real Redis, a tiny checkpoint."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from redis.asyncio import Redis

from tests.support.redis_server import embedded_redis
from twotower.broker.connection import connect
from twotower.broker.ready_queue import ReadyQueue
from twotower.context.loop import ContextLoop
from twotower.context.prefixes import PrefixCache
from twotower.context.scoring import ScoringService
from twotower.context.service import ContextService
from twotower.context.sessions import Sessions
from twotower.denoiser.loop import DenoiserLoop
from twotower.denoiser.worker import Worker
from twotower.engine.context_engine import ContextEngine
from twotower.engine.denoiser_engine import DenoiserEngine
from twotower.engine.progress import Progress
from twotower.engine.refinement import Refinement
from twotower.engine.thread import EngineThread
from twotower.internal.v1 import context_pb2, context_pb2_grpc, scoring_pb2_grpc
from twotower.model.checkpoint import Checkpoint
from twotower.model.pool import PoolSize, StatePool, pages_for
from twotower.model.weights import load_context_tower, load_denoiser_tower
from twotower.prefix.chain import ChainSpec
from twotower.request import GenerationParams
from twotower.rpc.channel import open_channel
from twotower.rpc.server import RpcServer
from twotower.tasks import end_tasks
from twotower.tracing.recorder import NO_TRACER
from twotower.transport.config import TransportConfig
from twotower.transport.ends import ContextTransports, WorkerTransports
from twotower.v1 import inference_pb2
from twotower.wire.params import params_to_pb

CPU = torch.device("cpu")


@dataclass
class RunningWorker:
    """A worker and its tasks."""

    worker: Worker
    loop: DenoiserLoop
    pool: StatePool
    transports: WorkerTransports
    thread: EngineThread
    tasks: list[asyncio.Task[None]] = field(default_factory=list)
    """The first is the engine's loop."""

    def slow_down(self) -> None:
        """So that no machine finishes 4,000 forwards before a short deadline."""
        step = self.loop.engine.step

        def slowly(blocks: Iterable[Refinement]) -> None:
            time.sleep(0.005)  # on the engine's own thread
            step(blocks)

        self.loop.engine.step = slowly  # type: ignore[method-assign]

    async def die(self) -> None:
        """Vanish without a word: connections cut, nothing handed back."""
        computing, *others = self.tasks
        await end_tasks(*others, *self.worker._running.values())
        self.loop.inbox.put(None)
        await asyncio.gather(computing, return_exceptions=True)
        self.thread.close()
        self.transports.close()


class Towers:
    """One context, any number of workers."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        service: ContextService,
        loop: ContextLoop,
        pool: StatePool,
        server: RpcServer,
        redis: Redis,
        redis_url: str,
    ) -> None:
        self.checkpoint = checkpoint
        self.loop = loop
        self.pool = pool
        self.service = service
        self.redis = redis
        self.redis_url = redis_url
        self.queue = ReadyQueue(redis, checkpoint.identity, claim_idle_ms=200)
        self.channel = open_channel(server.address)
        self.stub = context_pb2_grpc.ContextTowerStub(self.channel)
        self.workers: list[RunningWorker] = []

    def start_worker(self, slots: int = 8, transport: str = "auto") -> RunningWorker:
        """One more."""
        engine = DenoiserEngine(load_denoiser_tower(self.checkpoint, torch.float32, CPU))
        pool, thread, progress = _pool(self.checkpoint, slots), EngineThread("denoiser"), Progress(30)
        deliver = asyncio.get_running_loop().call_soon_threadsafe
        loop = DenoiserLoop(engine, pool, lambda results: deliver(worker.take, results), progress=progress)
        transports = WorkerTransports(TransportConfig.of(transport), CPU)
        worker = Worker(self.checkpoint, loop, self.queue, f"worker-{len(self.workers)}", pool, transports, progress)
        running = RunningWorker(worker, loop, pool, transports, thread)
        running.tasks = [asyncio.create_task(work) for work in (thread.run(loop.run), worker.pull(), worker.flush())]
        self.workers.append(running)
        return running

    def open(
        self, prompt: list[int], params: GenerationParams, generated: int = 0, rounds: Sequence[int] = ()
    ) -> AsyncIterator[context_pb2.SessionEvent]:
        """A session's events."""
        request = context_pb2.OpenRequest(
            request_id="test",
            prompt=inference_pb2.TokenIds(ids=prompt),
            generated=generated,
            params=params_to_pb(params),
            rounds=rounds,
        )
        return self.stub.Open(request)  # type: ignore[no-any-return]

    async def generate(self, prompt: list[int], params: GenerationParams) -> tuple[list[int], int]:
        """Tokens and forwards of a whole session."""
        tokens: list[int] = []
        forwards = 0
        async for event in self.open(prompt, params):
            if event.HasField("block"):
                tokens += event.block.token_ids
                forwards += event.block.forwards
        return tokens, forwards


def _pool(checkpoint: Checkpoint, slots: int) -> StatePool:
    return StatePool(checkpoint.config, torch.float32, CPU, PoolSize(slots, slots * pages_for(checkpoint.limits.max_context)))


@asynccontextmanager
async def towers(
    path: Path,
    max_sessions: int = 64,
    max_waiting: int = 0,
    transport: str = "auto",
    prefix_bytes: int = 1 << 24,
    silence_s: float = 5.0,
) -> AsyncIterator[Towers]:
    """A context that serves; everything is gone when left."""
    checkpoint = Checkpoint.open(path)
    async with embedded_redis() as server:
        redis = await connect(server.url)
        engine = ContextEngine(load_context_tower(checkpoint, torch.float32, CPU))
        thread, pool, progress = EngineThread("context"), _pool(checkpoint, max_sessions), Progress(30)
        prefixes = PrefixCache(ChainSpec(checkpoint.identity, "float32", 16), prefix_bytes, engine.decay_rates, None)
        deliver = asyncio.get_running_loop().call_soon_threadsafe
        loop = ContextLoop(
            engine,
            pool,
            prefixes,
            lambda results: deliver(sessions.take, results),
            chunk=16,
            budget=64,
            max_waiting=max_waiting,
            progress=progress,
        )
        sessions = Sessions(loop, ReadyQueue(redis, checkpoint.identity), None)
        rpc = RpcServer("127.0.0.1", 0)
        transports = ContextTransports(TransportConfig.of(transport), "127.0.0.1", CPU)
        service = ContextService(checkpoint, sessions, pool, transports, NO_TRACER, silence_s)
        context_pb2_grpc.add_ContextTowerServicer_to_server(service, rpc.server)
        scoring = ScoringService(loop.inbox, checkpoint.limits, pool, lambda: service.draining)
        scoring_pb2_grpc.add_ScoringServicer_to_server(scoring, rpc.server)
        await rpc.start(["twotower.internal.v1.ContextTower"])
        sessions.address = rpc.address
        working = asyncio.create_task(thread.run(loop.run))
        watching = asyncio.create_task(sessions.watch_queue())
        running = Towers(checkpoint, service, loop, pool, rpc, redis, server.url)
        try:
            yield running
        finally:
            for worker in running.workers:
                await worker.die()
            await running.channel.close(None)
            await rpc.stop(0)
            await end_tasks(watching)
            loop.inbox.put(None)
            await asyncio.gather(working, return_exceptions=True)
            await sessions.close()
            thread.close()
            transports.close()
            with contextlib.suppress(Exception):
                await redis.aclose()
