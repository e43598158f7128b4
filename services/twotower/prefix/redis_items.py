"""Byte items in Redis with a common bound: the least recently used go first, and every item expires after its last use.

An item is a list of pieces under its own key. It is written under another key and becomes an item in one atomic step,
which also enforces the bound. So a reader finds all of an item or nothing, and a writer that dies leaves nothing
behind. Only items that are still being written come on top of the bound.

Beside the items lie two keys: a sorted set, name -> time of last use, and a hash, name -> bytes, with their sum.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from redis.asyncio import Redis

from twotower.broker.connection import broker_errors

WRITE_MS = 60_000
"""How long a writer holds the claim to a name, and how long an unfinished item outlives its writer."""

USE = """
-- ARGV: bytes at most; how long an item lives, ms; what item keys begin with; then for each item that is used, the
-- one to live longest first: its name, the key it was written under ('' if it was not), its bytes.
local limit, ttl, prefix = tonumber(ARGV[1]), tonumber(ARGV[2]), ARGV[3]
local uses, sizes = KEYS[1], KEYS[2]
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local function drop(name)
    redis.call('UNLINK', prefix .. name)
    redis.call('ZREM', uses, name)
    redis.call('HINCRBY', sizes, 'total', -(redis.call('HGET', sizes, name) or 0))
    redis.call('HDEL', sizes, name)
end
if redis.call('EXISTS', uses) ~= redis.call('EXISTS', sizes) then
    redis.call('UNLINK', uses, sizes)  -- one is worth nothing without the other; items without them expire
end
for _, name in ipairs(redis.call('ZRANGE', uses, '-inf', now - ttl * 1000, 'BYSCORE')) do drop(name) end
for i = 4, #ARGV, 3 do
    local name, written, bytes = ARGV[i], ARGV[i + 1], ARGV[i + 2]
    local known = redis.call('ZSCORE', uses, name)
    if written ~= '' and known then
        redis.call('UNLINK', written)
    elseif written ~= '' and redis.call('EXISTS', written) == 1 then
        redis.call('RENAME', written, prefix .. name)
        redis.call('HSET', sizes, name, bytes)
        redis.call('HINCRBY', sizes, 'total', bytes)
        known = true
    end
    if known and redis.call('PEXPIRE', prefix .. name, ttl) == 1 then
        redis.call('ZADD', uses, now - i, name)
    elseif known then
        drop(name)  -- the server took it, to save memory
    end
end
local evicted = 0
while tonumber(redis.call('HGET', sizes, 'total') or 0) > limit do
    local oldest = redis.call('ZRANGE', uses, 0, 0)[1]
    if not oldest then break end
    drop(oldest)
    evicted = evicted + 1
end
redis.call('PEXPIRE', uses, ttl)
redis.call('PEXPIRE', sizes, ttl)
return {evicted, tonumber(redis.call('HGET', sizes, 'total') or 0)}
"""


class Usage(NamedTuple):
    """The outcome of a use."""

    evicted: int
    """Items that were evicted."""
    held_bytes: int
    """The bytes of all items."""


class RedisItems:
    """Items under names. Methods raise BrokerUnavailable; `redis` must not decode what it reads."""

    def __init__(self, redis: Redis, prefix: str, *, max_bytes: int, ttl_s: float) -> None:
        """`prefix`: the beginning of all keys. `ttl_s`: how long an item lives after its last use."""
        self._redis = redis
        self._prefix = prefix
        self._index = (prefix + "uses", prefix + "sizes")
        self.max_bytes = max_bytes
        self._ttl_ms = round(ttl_s * 1000)

    async def present(self, names: Sequence[str]) -> list[bool]:
        """Whether each item exists. This does not count as a use; it takes one command."""
        if not names:
            return []
        with broker_errors():
            scores: Any = await self._redis.zmscore(self._index[0], list(names))
        return [score is not None for score in scores]

    async def read(self, names: Sequence[str]) -> list[list[bytes]]:
        """The pieces of each item, none for one that does not exist. This counts as a use; it takes one round trip.

        `names`: the item that is to live longest comes first.
        """
        with broker_errors():
            async with self._redis.pipeline(transaction=False) as pipe:
                pipe.eval(USE, 2, *self._index, *self._arguments(dict.fromkeys(names)))
                for name in names:
                    pipe.lrange(self._item(name), 0, -1)
                answers: Any = await pipe.execute()
        return list(answers[1:])

    async def claim(self, name: str) -> bool:
        """Claim the writing of an item for `WRITE_MS`; returns False if another writer holds the claim."""
        with broker_errors():
            return bool(await self._redis.set(f"{self._prefix}claim:{name}", 1, nx=True, px=WRITE_MS))

    async def write(self, names: Sequence[str], contents: Mapping[str, Iterable[bytes]]) -> Usage:
        """Write the items in `contents`, piece by piece, then use `names`, of which the one to live longest comes first.

        An item that exists by then is not replaced.
        """
        writer = uuid.uuid4().hex
        written: dict[str, tuple[str, int] | None] = dict.fromkeys(names)
        with broker_errors():
            for name, pieces in contents.items():
                key, num_bytes = f"{self._prefix}writing:{writer}:{name}", 0
                for piece in pieces:  # a round trip each, so that the server can serve other clients in between
                    async with self._redis.pipeline(transaction=False) as pipe:
                        pipe.rpush(key, piece)
                        pipe.pexpire(key, WRITE_MS)
                        await pipe.execute()
                    num_bytes += len(piece)
                written[name] = (key, num_bytes)
            return await self._use(written)

    async def drop(self, names: Sequence[str]) -> Usage:
        """Remove items."""
        with broker_errors():
            await self._redis.unlink(*map(self._item, names))
            return await self._use(dict.fromkeys(names))  # which notices that they are gone

    async def _use(self, written: Mapping[str, tuple[str, int] | None]) -> Usage:
        answer: Any = await self._redis.eval(USE, 2, *self._index, *self._arguments(written))
        return Usage(*answer)

    def _arguments(self, written: Mapping[str, tuple[str, int] | None]) -> list[Any]:
        arguments: list[Any] = [self.max_bytes, self._ttl_ms, self._item("")]
        for name, how in written.items():
            arguments += (name, *(how or ("", 0)))
        return arguments

    def _item(self, name: str) -> str:
        return f"{self._prefix}item:{name}"
