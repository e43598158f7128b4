"""Cached prefixes of prompts: a hit has the bits of a fresh prefill, in this process and from Redis."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import torch
from redis.asyncio import Redis

from tests.support.checkpoints import write_tiny_checkpoint
from tests.support.loops import CHUNK, TinyTowers
from tests.support.redis_server import embedded_redis
from tests.support.towers import towers
from tests.support.waiting import until
from twotower.broker.connection import connect
from twotower.context.messages import ContextResult, OpenSession, PrefixHit, PrefixLoaded, PrefixWanted
from twotower.context.prefixes import SNAPSHOTS, PromptBorders
from twotower.engine.local import LocalEngine
from twotower.engine.session import Session
from twotower.model.state import ContextState
from twotower.prefix.chain import ChainSpec
from twotower.prefix.redis_tier import RedisTier, RedisTierConfig
from twotower.prefix.stats import TierStats
from twotower.request import GenerationParams, Priority

SYSTEM = [random.Random(0).randrange(4, 90) for _ in range(100)]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


class Reader:
    """A context without its services: its loop, and what `Sessions` does for prefixes."""

    def __init__(self, towers: TinyTowers, capacity: int, redis: RedisTier | None) -> None:
        self.results: list[ContextResult] = []
        self.redis = redis
        self.pool = towers.pool(40)
        self.loop = towers.context_loop(self.results.extend, self.pool, prefix_bytes=capacity, redis=redis, budget=40)
        self.cache = self.loop._prefixes
        self.engine = self.loop._engine
        self._names = itertools.count()

    async def read(self, prompt: list[int]) -> tuple[Session, int]:
        """The session, and how many tokens of its prompt came from the cache."""
        name, cached = str(next(self._names)), None
        self.loop.inbox.put(OpenSession(name, prompt, 0, GenerationParams(max_tokens=40), Priority.NORMAL))
        while cached is None or self.loop._ahead:
            self.loop.iterate() if cached is not None else self.loop._receive(0)
            for result in self.results:
                if isinstance(result, PrefixWanted):
                    assert self.redis is not None
                    chunks = await self.redis.longest(result.links)
                    snapshot = await self.redis.load(result.links[:chunks], chunks) if chunks else None
                    self.loop.inbox.put(PrefixLoaded(name, chunks, snapshot))
                elif isinstance(result, PrefixHit) and self.redis is not None:
                    self.redis.store_later(result.links, len(result.links), result.snapshot)
            self.results.clear()
            resident = self.loop._residents[name]
            if cached is None and not resident.awaits_prefix:
                cached = resident.session.state.length
        return resident.session, cached


@asynccontextmanager
async def reader(path: Path, capacity: int = 1 << 24, redis: Redis | None = None) -> AsyncIterator[Reader]:
    towers = TinyTowers(path)
    spec, tower, tier = ChainSpec(towers.checkpoint.identity, "float32", CHUNK), towers.context, None
    if redis is not None:
        tier = RedisTier(redis, spec, tower.config, tower.dtype, RedisTierConfig(), TierStats())
    yield Reader(towers, capacity, tier)
    if tier is not None:
        await tier.close()


def _same(a: ContextState, b: ContextState) -> bool:
    mamba = all(torch.equal(a.mamba[i].ssm, b.mamba[i].ssm) for i in a.mamba)
    # Of a conv tail the oldest column is never read again.
    conv = all(torch.equal(a.mamba[i].conv[:, 1:], b.mamba[i].conv[:, 1:]) for i in a.mamba)
    kv = all(
        torch.equal(x, y) for i in a.kv for x, y in zip(a.kv[i].slice(0, a.length), b.kv[i].slice(0, b.length), strict=True)
    )
    return a.length == b.length and mamba and conv and kv


async def test_the_second_prompt_reads_its_tail_alone_and_has_the_bits_of_a_fresh_one(path: Path) -> None:
    async with reader(path) as cached, reader(path, capacity=0) as fresh:
        assert (await cached.read([*SYSTEM, 7]))[1] == 0
        for tail in ([8], [9, 10], list(range(4, 60)), []):
            session, from_cache = await cached.read([*SYSTEM, *tail])
            assert from_cache == 96
            assert _same(session.state, (await fresh.read([*SYSTEM, *tail]))[0].state)
        assert cached.cache.tiers["device"].hits == 4
        assert fresh.cache.tiers["device"].hits + fresh.cache.tiers["device"].misses == 0


async def test_a_prompt_of_whole_chunks_keeps_something_to_read(path: Path) -> None:
    async with reader(path) as cached:
        whole = SYSTEM[: 4 * CHUNK]
        await cached.read(whole)
        session, from_cache = await cached.read(whole)
        assert from_cache == 3 * CHUNK
        assert session.state.length == len(whole)


async def test_sessions_that_share_a_prefix_do_not_share_a_state(path: Path) -> None:
    async with reader(path) as cached, reader(path, capacity=0) as fresh:
        await cached.read([*SYSTEM, 7])
        (one, _), (other, _) = await asyncio.gather(cached.read([*SYSTEM, 8]), cached.read([*SYSTEM, 9]))
        cached.engine.commit([(one, [5] * 16)])
        assert _same(other.state, (await fresh.read([*SYSTEM, 9]))[0].state)
        assert _same((await cached.read([*SYSTEM, 8]))[0].state, (await fresh.read([*SYSTEM, 8]))[0].state)


async def test_prompts_that_come_once_do_not_push_out_one_that_repeats(path: Path) -> None:
    async with reader(path, capacity=600_000) as cached:
        for tail in (7, 8):
            await cached.read([*SYSTEM, tail])
        for seed in range(1, 30):
            rng = random.Random(seed)
            await cached.read([rng.randrange(4, 90) for _ in range(100)])
        assert cached.cache.tiers["device"].evictions
        assert (await cached.read([*SYSTEM, 9]))[1] == 96


async def test_another_replica_reads_it_from_redis(path: Path) -> None:
    async with embedded_redis() as server:
        redis = await connect(server.url, decode=False)
        async with reader(path, redis=redis) as first, reader(path, redis=redis) as second, reader(path, capacity=0) as fresh:
            for tail in (7, 8):
                await first.read([*SYSTEM, tail])
            await until(lambda: first.cache.tiers["redis"].bytes > 0)
            session, from_cache = await second.read([*SYSTEM, 9])
            assert from_cache == 96
            assert _same(session.state, (await fresh.read([*SYSTEM, 9]))[0].state)
            assert (await second.read([*SYSTEM, 10]))[1] == 96
            assert second.cache.tiers["device"].hits == 1  # from then on it holds the prefix itself
        await redis.aclose()


async def test_texts_are_the_same_with_a_cache(path: Path) -> None:
    local, params = LocalEngine(path, threads=1), GenerationParams(max_tokens=40, gamma=0.3)
    async with towers(path) as stack:
        stack.start_worker()
        for tail in (7, 8, 9):
            prompt = [*SYSTEM, tail]
            assert (await stack.generate(prompt, params))[0] == local.generate(prompt, params).token_ids


def test_borders_of_a_long_prompt_are_few_and_in_common_with_others() -> None:
    kept = [{k for k in range(n + 2) if PromptBorders([b""] * n, 5).keeps(k)} for n in (10, 100, 260)]
    assert kept[0] == set(range(1, 11))
    assert all(len(each) <= SNAPSHOTS + 1 for each in kept)
    assert {5, 8, 16} <= kept[1]
    assert {32, 64, 96} <= kept[1] & kept[2]
