"""Who is alive."""

from __future__ import annotations

import dataclasses
import json

from redis.asyncio import Redis

from twotower.broker import orders
from twotower.broker.registry import ORDER_TTL_MS, TTL_MS, Registry, Replica

CONTEXT = Replica("context", "c1", "127.0.0.1:1", "abc", load=2, capacity=64)
DENOISER = Replica("denoiser", "d1", "127.0.0.1:2", "abc", load=0, capacity=8)


async def test_announced_until_withdrawn(redis: Redis) -> None:
    registry = Registry(redis, "abc")
    assert await registry.replicas("context") == []
    second = dataclasses.replace(CONTEXT, name="c2", address="127.0.0.1:3")
    for replica in (second, CONTEXT, DENOISER):
        await registry.announce(replica)
    assert await registry.replicas("context") == [CONTEXT, second]
    assert await registry.replicas("denoiser") == [DENOISER]
    busier = dataclasses.replace(CONTEXT, load=5)
    await registry.announce(busier)
    await registry.withdraw(second)
    assert await registry.replicas("context") == [busier]


async def test_who_falls_silent_expires(redis: Redis) -> None:
    registry = Registry(redis, "abc")
    await registry.announce(CONTEXT)
    key = "twotower:abc:replica:context:c1"
    assert 0 < await redis.pttl(key) <= TTL_MS
    await redis.pexpire(key, 1)
    while await redis.exists(key):
        pass
    assert await registry.replicas("context") == []


async def test_other_checkpoints_are_not_listed(redis: Redis) -> None:
    await Registry(redis, "abc").announce(CONTEXT)
    assert await Registry(redis, "abd").replicas("context") == []


async def test_nothing_is_left_of_the_dead(redis: Redis) -> None:
    """Names of replicas that expired go when somebody looks, or when no replica is left."""
    registry = Registry(redis, "abc")
    await registry.announce(CONTEXT)
    await registry.announce(dataclasses.replace(CONTEXT, name="killed"))
    await redis.delete("twotower:abc:replica:context:killed")
    assert await registry.replicas("context") == [CONTEXT]
    assert await redis.smembers("twotower:abc:replicas:context") == {"c1"}
    assert 0 < await redis.pttl("twotower:abc:replicas:context") <= TTL_MS
    await registry.withdraw(CONTEXT)
    assert await redis.keys("*") == []


async def test_what_is_said_of_prefixes_is_heard(redis: Redis) -> None:
    registry = Registry(redis, "abc")
    keeps = dataclasses.replace(CONTEXT, dtype="bfloat16", chunk_tokens=128, prefixes="00" * 8 * 256)
    await registry.announce(keeps)
    assert await registry.replicas("context") == [keeps]


async def test_announcements_of_other_versions(redis: Redis) -> None:
    """One that says more, or leaves out what can be, is understood; one that cannot be understood is passed over."""
    registry = Registry(redis, "abc")
    whole = dataclasses.asdict(CONTEXT)
    older = {key: value for key, value in whole.items() if key not in ("dtype", "chunk_tokens", "prefixes")}
    more, less = {**whole, "name": "more", "mood": "good"}, {"name": "less"}
    for name, said in (("more", more), ("less", less), ("older", {**older, "name": "older"})):
        await registry.announce(dataclasses.replace(CONTEXT, name=name))
        await redis.set(f"twotower:abc:replica:context:{name}", json.dumps(said))
    assert await registry.replicas("context") == [dataclasses.replace(CONTEXT, name=name) for name in ("more", "older")]


async def test_an_order_is_heard_with_the_next_announcement_and_expires(redis: Redis) -> None:
    registry = Registry(redis, "abc")
    assert await registry.announce(DENOISER) is None
    await registry.order("denoiser", "d1", drain=True)
    assert await registry.announce(CONTEXT) is None  # it is another's
    assert await registry.announce(DENOISER) is True
    await registry.order("denoiser", "d1", drain=False)
    assert await registry.announce(DENOISER) is False
    assert 0 < await redis.pttl("twotower:abc:order:denoiser:d1") <= ORDER_TTL_MS
    await registry.withdraw(DENOISER)
    await registry.withdraw(CONTEXT)
    assert await redis.keys("*") == []


async def test_everybody_is_found_whatever_they_serve(redis: Redis) -> None:
    await Registry(redis, "abc").announce(CONTEXT)
    other = dataclasses.replace(DENOISER, identity="a:b")  # as a revision can be named
    await Registry(redis, "a:b").announce(other)
    assert await orders.everybody(redis) == [other, CONTEXT]
    assert orders.named([other, CONTEXT], ["127.0.0.1:1", "c1"]) == [CONTEXT]
    await orders.order(redis, other, drain=True)
    assert await Registry(redis, "a:b").announce(other) is True
    assert await orders.seen(redis, other) == other
    await Registry(redis, "a:b").withdraw(other)
    assert await orders.seen(redis, other) is None
