"""Items in a real server: whole or not there, within their bounds, gone in the end."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterable, Iterator

import pytest
from redis.asyncio import Redis

from tests.support.redis_server import embedded_redis
from twotower.broker.connection import connect
from twotower.errors import BrokerUnavailable
from twotower.prefix.redis_items import WRITE_MS, RedisItems

PREFIX = "twotower:abc:prefix:1:"


def items(redis: Redis, max_bytes: int = 1000, ttl_s: float = 100.0) -> RedisItems:
    return RedisItems(redis, PREFIX, max_bytes=max_bytes, ttl_s=ttl_s)


async def put(store: RedisItems, name: str, size: int) -> tuple[int, int]:
    return await store.write([name], {name: [bytes(size)]})


async def lengths(redis: Redis) -> int:
    """Bytes of all pieces there are, of items and of what is being written."""
    total = 0
    async for key in redis.scan_iter("*"):
        if await redis.type(key) == b"list":
            total += sum(len(piece) for piece in await redis.lrange(key, 0, -1))
    return total


async def test_what_is_written_is_read_in_pieces(redis: Redis) -> None:
    store = items(redis)
    pieces = [bytes([i]) * 50 for i in range(4)]
    assert await store.write(["a", "b"], {"a": iter(pieces), "b": [b"x"]}) == (0, 201)
    assert await store.present(["a", "c", "b"]) == [True, False, True]
    assert await store.present([]) == []
    assert await store.read(["a", "c", "b"]) == [pieces, [], [b"x"]]


async def test_the_least_recently_used_goes_first(redis: Redis) -> None:
    store = items(redis, 300)
    for name in "abc":
        assert (await put(store, name, 100))[0] == 0
    await store.read(["a"])
    assert await put(store, "d", 100) == (1, 300)
    assert await store.present(list("abcd")) == [True, False, True, True]
    assert await put(store, "e", 200) == (2, 300)
    assert await store.present(list("acde")) == [False, False, True, True]
    assert await lengths(redis) == 300


async def test_of_what_is_used_together_the_last_named_goes_first(redis: Redis) -> None:
    store = items(redis, 300)
    await store.write(list("abc"), {name: [bytes(100)] for name in "cba"})
    await put(store, "d", 100)
    assert await store.present(list("abcd")) == [True, True, False, True]


async def test_what_a_new_item_needs_is_used_with_it(redis: Redis) -> None:
    store = items(redis, 300)
    for name in "abc":
        await put(store, name, 100)
    assert await store.write(["a", "d"], {"d": [bytes(100)]}) == (1, 300)
    assert await store.present(list("abcd")) == [True, False, True, True]


async def test_what_is_there_is_not_replaced_and_counted_once(redis: Redis) -> None:
    store = items(redis)
    await store.write(["a"], {"a": [b"first"]})
    assert await store.write(["a"], {"a": [b"second"]}) == (0, 5)
    assert await store.read(["a"]) == [[b"first"]]
    assert await lengths(redis) == 5


async def test_an_item_too_large_for_all_bounds_is_not_kept(redis: Redis) -> None:
    store = items(redis, 100)
    assert await put(store, "a", 101) == (1, 0)
    assert await store.present(["a"]) == [False]
    assert await lengths(redis) == 0


async def test_half_an_item_is_never_seen_and_does_not_last(redis: Redis) -> None:
    store = items(redis)

    def dies() -> Iterator[bytes]:
        yield b"half"
        raise RuntimeError("the writer dies")

    with pytest.raises(RuntimeError):
        await store.write(["a"], {"a": dies()})
    assert await store.present(["a"]) == [False]
    assert await store.read(["a"]) == [[]]
    (left,) = await redis.keys("*")
    assert 0 < await redis.pttl(left) <= WRITE_MS


async def test_one_writer_at_a_time(redis: Redis) -> None:
    store, other = items(redis), items(redis)
    assert sorted(await asyncio.gather(store.claim("a"), other.claim("a"))) == [False, True]
    assert await other.claim("b")
    assert 0 < await redis.pttl(PREFIX + "claim:a") <= WRITE_MS


async def test_items_expire_some_time_after_their_last_use(redis: Redis) -> None:
    store = items(redis, ttl_s=100)
    await put(store, "a", 10)
    await redis.pexpire(PREFIX + "item:a", 1000)
    await store.read(["a"])
    for key in ("item:a", "uses", "sizes"):
        assert 99_000 < await redis.pttl(PREFIX + key) <= 100_000


async def test_nothing_is_left_when_all_expired(redis: Redis) -> None:
    store = items(redis, ttl_s=0.05)
    await put(store, "a", 10)
    async with asyncio.timeout(10):
        while await redis.keys("*"):
            pass  # it takes a moment


async def test_what_expired_is_not_counted(redis: Redis) -> None:
    store = items(redis, ttl_s=100)
    await put(store, "a", 10)
    await redis.zadd(PREFIX + "uses", {"a": 0})
    assert await put(store, "b", 5) == (0, 5)
    assert await store.present(["a", "b"]) == [False, True]
    assert await lengths(redis) == 5


@pytest.mark.parametrize("lost", ["item:a", "uses", "sizes"])
async def test_a_server_that_gave_up_a_key_to_save_memory(redis: Redis, lost: str) -> None:
    """Items are missing then, but the bound holds."""
    store = items(redis, 300)
    for name in "ab":
        await put(store, name, 100)
    await redis.delete(PREFIX + lost)
    await store.read(["a"])
    assert (await store.present(["a"])) == [False]
    for name in "cdefg":
        await put(store, name, 100)
    assert await store.present(list("cdefg")) == [False, False, True, True, True]
    total = await redis.hget(PREFIX + "sizes", "total")
    assert total == b"300"


async def test_what_is_dropped_is_gone(redis: Redis) -> None:
    store = items(redis)
    for name in "ab":
        await put(store, name, 100)
    assert await store.drop(["a", "c"]) == (0, 100)
    assert await store.present(["a", "b"]) == [False, True]
    assert await lengths(redis) == 100


async def test_many_replicas_at_once_keep_the_bound(redis: Redis) -> None:
    rng = random.Random(0)
    stores = [items(redis, 1000) for _ in range(6)]

    def pieces(name: str) -> Iterable[bytes]:
        return [name.encode() * 10] * 3

    async def replica(store: RedisItems) -> None:
        for _ in range(40):
            name = str(rng.randrange(100, 150))
            if await store.claim(name):
                usage = await store.write([name], {name: pieces(name)})
                assert usage.held_bytes <= 1000
            (found,) = await store.read([name])
            assert found in ([], pieces(name))
            await redis.delete(PREFIX + f"claim:{name}")

    await asyncio.gather(*map(replica, stores))
    total = int(await redis.hget(PREFIX + "sizes", "total") or 0)
    assert total == await lengths(redis) == 90 * await redis.zcard(PREFIX + "uses")
    assert total > 900


async def test_a_server_that_is_gone() -> None:
    async with embedded_redis() as server:
        client = await connect(server.url, decode=False)
    store = items(client)
    for call in (store.present(["a"]), store.read(["a"]), store.claim("a"), put(store, "a", 1), store.drop(["a"])):
        with pytest.raises(BrokerUnavailable):
            await call
    await client.aclose()
