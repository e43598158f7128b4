"""The tier that replicas share: states at borders that repeat, in Redis. It never fails a request, and never holds one up.

Every problem counts as a miss, whether Redis does not answer, is slow, or returns data that does not fit the model. Redis
is then not asked for a while, after which a single request tries it again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from redis.asyncio import Redis
from torch import Tensor

from twotower.broker.keys import prefix_items
from twotower.errors import BrokerUnavailable, Incompatible
from twotower.model.config import ModelConfig
from twotower.prefix.chain import ChainSpec
from twotower.prefix.payload import PAYLOAD_VERSION, PrefixPayload
from twotower.prefix.redis_items import RedisItems, Usage
from twotower.prefix.stats import TierStats
from twotower.tasks import end_tasks
from twotower.wire.frames import Key

log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class RedisTierConfig:
    """The tier's bounds."""

    max_bytes: int = 4 * 1024**3
    """The most bytes of all items of one checkpoint, whichever replica wrote them."""
    ttl_s: float = 3600.0
    """How long an item lives after its last use."""
    lookup_s: float = 0.25
    """How long a request waits for a lookup."""
    load_s: float = 2.0
    """How long a request waits for the state itself."""
    store_s: float = 30.0
    """How long a write, for which no request waits, may take."""
    delay_s: float = 0.5
    """How long a write is delayed, so that it does not share cores with the prefill of the request that caused it."""
    max_stores: int = 2
    """The most writes that are under way or delayed; one more is skipped. Each holds a whole state in memory."""
    away_s: float = 5.0
    """How long Redis is not asked after it failed to answer."""


class RedisTier:
    """Holds states by chain and number of chunks. No method raises BrokerUnavailable."""

    def __init__(
        self, redis: Redis, spec: ChainSpec, model: ModelConfig, dtype: torch.dtype, config: RedisTierConfig, stats: TierStats
    ) -> None:
        """`redis` must not decode what it reads (see `broker.connection.connect`). `spec`: that of the chains it is given."""
        prefix = prefix_items(spec.identity, PAYLOAD_VERSION)
        self._items = RedisItems(redis, prefix, max_bytes=config.max_bytes, ttl_s=config.ttl_s)
        self._payload = PrefixPayload(model, dtype, spec.chunk_tokens)
        self._chunk_tokens = spec.chunk_tokens
        self._config = config
        self._away_until: float | None = None
        """By the loop's clock; None while Redis answers."""
        self._stores: set[asyncio.Task[bool]] = set()
        self.stats = stats

    async def longest(self, chain: Sequence[bytes]) -> int:
        """The number of chunks, from the start, for which there is a complete state; 0 if none. It takes one round trip."""
        names = [*map(_chunk, chain), *map(_border, chain)]
        there = await self._ask(lambda: self._items.present(names), self._config.lookup_s)
        found = 0
        for chunks, (kv, state) in enumerate(zip(there[: len(chain)], there[len(chain) :], strict=True), 1) if there else ():
            if not kv:
                break
            if state:
                found = chunks
        self.stats.misses += found == 0
        return found

    async def load(self, chain: Sequence[bytes], chunks: int) -> dict[Key, Tensor] | None:
        """The state after `chunks` chunks, with the names of `wire.state.state_tensors` but without ``a``; None: a miss.

        On the CPU: conv (conv_dim, K - 1), ssm (heads, head_dim, state) fp32, k and v (kv_heads, tokens, head_dim).
        """
        names = _names(chain, chunks)
        found = await self._ask(lambda: self._items.read(names), self._config.load_s)
        if found is None or not all(found):
            self.stats.misses += 1
            return None
        try:
            state = await asyncio.to_thread(self._payload.unpack, found[-1], found[:-1])
        except Incompatible as error:
            log.warning("a state in the prefix cache does not fit this model, and is dropped: %s", error)
            self.stats.failures += 1
            self.stats.misses += 1
            await self._ask(lambda: self._items.drop(names), self._config.lookup_s)
            return None
        self.stats.hits += 1
        self.stats.hit_tokens += chunks * self._chunk_tokens
        return state

    def store_later(self, chain: Sequence[bytes], chunks: int, tensors: Mapping[Key, Tensor]) -> bool:
        """Run `store` in the background; returns False if too many writes are under way.

        `tensors` must not change any more: pass copies of a running session's tensors, since these lie in its slot.
        """
        if len(self._stores) >= self._config.max_stores:
            return False
        task = asyncio.create_task(self._store_soon(chain, chunks, tensors))
        self._stores.add(task)
        task.add_done_callback(self._stored)
        return True

    async def store(self, chain: Sequence[bytes], chunks: int, tensors: Mapping[Key, Tensor]) -> bool:
        """Write the parts of the state after `chunks` chunks (see `load`) that are missing; returns whether any were written.

        Raises Incompatible if the tensors are no such state.
        """
        self._payload.check(tensors, chunks)
        if self._payload.size(chunks) > self._config.max_bytes:
            return False
        usage = await self._ask(lambda: self._store(chain, chunks, tensors), self._config.store_s)
        if usage is None:
            return False
        self.stats.bytes = usage.held_bytes
        if usage.evicted:
            self.stats.evictions["lru"] += usage.evicted
        return True

    async def close(self) -> None:
        """Cancel the writes under way."""
        await end_tasks(*self._stores)

    async def _store_soon(self, chain: Sequence[bytes], chunks: int, tensors: Mapping[Key, Tensor]) -> bool:
        await asyncio.sleep(self._config.delay_s)
        return await self.store(chain, chunks, tensors)

    async def _store(self, chain: Sequence[bytes], chunks: int, tensors: Mapping[Key, Tensor]) -> Usage | None:
        """As `store`; None: the state is there, or another replica is writing it."""
        names = _names(chain, chunks)
        there = await self._items.present(names)
        if there[-1] or not await self._items.claim(names[-1]):
            return None
        missing = [i for i in range(chunks) if not there[i]]
        contents = {names[i]: await asyncio.to_thread(self._payload.pack_chunk, tensors, i) for i in missing}
        contents[names[-1]] = await asyncio.to_thread(self._payload.pack_border, tensors)
        return await self._items.write(names, contents)

    async def _ask(self, question: Callable[[], Awaitable[T]], limit_s: float) -> T | None:
        """The answer; None if there is none in time, which is logged once until Redis answers again."""
        clock = asyncio.get_running_loop().time
        if self._away_until is not None:
            if clock() < self._away_until:
                return None
            self._away_until = clock() + self._config.away_s  # only this request tries; the others do not wait with it
        try:
            async with asyncio.timeout(limit_s):
                answer = await question()
        except (BrokerUnavailable, TimeoutError) as error:
            if self._away_until is None:
                log.warning("the prefix cache does without Redis: %s", str(error) or f"no answer in {limit_s:g} s")
            self._away_until = clock() + self._config.away_s
            self.stats.failures += 1
            return None
        if self._away_until is not None:
            log.warning("the prefix cache uses Redis again")
            self._away_until = None
        return answer

    def _stored(self, task: asyncio.Task[bool]) -> None:
        self._stores.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a state could not be stored", exc_info=error)


def _chunk(link: bytes) -> str:
    return "kv:" + link.hex()


def _border(link: bytes) -> str:
    return "state:" + link.hex()


def _names(chain: Sequence[bytes], chunks: int) -> list[str]:
    """The items of a state, the one to live longest first: without an early chunk the later ones are useless."""
    return [*map(_chunk, chain[:chunks]), _border(chain[chunks - 1])]
