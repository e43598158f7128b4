"""The process of a tower, up to where its loop begins and from where that ends: the same for both towers."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch
from redis.asyncio import Redis

from twotower.broker.connection import connect
from twotower.broker.ready_queue import ReadyQueue
from twotower.broker.registry import Registry, ReplicaKind
from twotower.engine.graphs import WarmUp, batch_buckets, token_buckets
from twotower.engine.progress import Progress
from twotower.engine.thread import EngineThread
from twotower.engine.turns import Turns
from twotower.garbage import keep_freed_blocks
from twotower.model.checkpoint import Checkpoint
from twotower.model.config import ModelConfig
from twotower.model.memory import state_budget
from twotower.model.pool import PAGE, PoolSize, StatePool
from twotower.model.weights import resolve_device, resolve_dtype
from twotower.service.config import ServiceConfig, TowerConfig
from twotower.tasks import end_tasks

log = logging.getLogger(__name__)


class LoadedTower(Protocol):
    """What is asked of a tower here."""

    @property
    def config(self) -> ModelConfig: ...  # noqa: D102
    @property
    def dtype(self) -> torch.dtype: ...  # noqa: D102
    @property
    def device(self) -> torch.device: ...  # noqa: D102


class Engine(Protocol):
    """What is asked of an engine here."""

    def warm_up(self, pool: StatePool, *, batches: Iterable[int], contexts: Iterable[int]) -> WarmUp:
        """Make what its forwards reuse, for these sizes."""


class Loop(Protocol):
    """What is asked of a loop here."""

    def run(self) -> None:
        """Until it is told to end."""


T = TypeVar("T", bound=LoadedTower)
E = TypeVar("E", bound=Engine)


@dataclass(frozen=True, slots=True)
class TowerKind(Generic[T, E]):
    """What tells one tower's process from the other's."""

    name: ReplicaKind
    load: Callable[..., T]
    """`load_context_tower` or `load_denoiser_tower`."""
    engine: Callable[[T], E]
    first_use: Callable[[E], None]
    """Forwards that pay what first uses cost, so that the first request does not."""
    row_positions: Callable[[Checkpoint], int]
    """Positions of a session whose logits a forward holds at once."""


@dataclass(frozen=True, slots=True)
class TowerProcess(Generic[T, E]):
    """A tower that is loaded and warm, and what its loop needs beside it."""

    checkpoint: Checkpoint
    redis: Redis
    queue: ReadyQueue
    registry: Registry
    turns: Turns
    thread: EngineThread
    tower: T
    engine: E
    pool: StatePool

    @asynccontextmanager
    async def working(self, loop: Loop, progress: Progress) -> AsyncIterator[asyncio.Task[None]]:
        """`loop` runs, watched, as long as this lasts and it has not ended itself. Whoever leaves has told it to end."""
        working, guarding = asyncio.create_task(self.thread.run(loop.run)), asyncio.create_task(progress.guard())
        yield working
        await working
        await end_tasks(guarding)
        log.info("drained: %d slots and %d pages in use", self.pool.used_slots, self.pool.used_pages)


@asynccontextmanager
async def tower_process(
    kind: TowerKind[T, E], service: ServiceConfig, config: TowerConfig, *, context_experts: str, slots: int
) -> AsyncIterator[TowerProcess[T, E]]:
    """Load a tower and connect to Redis. `slots`: sessions that it holds at most.

    Raises CheckpointError, ConfigError, BrokerUnavailable.
    """
    keep_freed_blocks()
    checkpoint = Checkpoint.open_shared(
        service.checkpoint, (kind.name,), context_experts=context_experts, revision=service.revision
    )
    device = resolve_device(config.device)
    turns = Turns(config.turns if device.type == "cpu" else None)
    redis = await connect(service.redis_url)
    thread = EngineThread(f"{kind.name}-engine", config.threads, pinned=turns.shared)
    try:
        place = resolve_dtype(config.dtype, checkpoint), device
        tower = await thread.run(kind.load, checkpoint, *place, experts=config.experts, kernels=config.kernels)
        engine = kind.engine(tower)
        await thread.run(kind.first_use, engine)
        size = PoolSize.within(
            tower.config,
            tower.dtype,
            state_budget(config.state_memory, tower.device),
            max_slots=slots,
            max_tokens=checkpoint.limits.max_context,
            # Logits in fp32, and what choosing tokens makes of them.
            row_bytes=2 * 4 * kind.row_positions(checkpoint) * tower.config.vocab_size,
        )
        pool = StatePool(tower.config, tower.dtype, tower.device, size)
        log.debug("state memory: %d slots, %d pages", pool.size.slots, pool.size.pages)
        tokens = min(checkpoint.limits.max_context, pool.size.pages * PAGE)
        contexts, batches = token_buckets(tokens), batch_buckets(pool.size.slots)
        warm = await thread.run(lambda: engine.warm_up(pool, batches=batches, contexts=contexts))
        if warm.sizes:
            log.info("warm: %s", warm)
        queue, registry = ReadyQueue(redis, checkpoint.identity), Registry(redis, checkpoint.identity)
        yield TowerProcess(checkpoint, redis, queue, registry, turns, thread, tower, engine, pool)
    finally:
        thread.close()
        turns.close()
        await redis.aclose()
