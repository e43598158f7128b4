"""Who is alive."""

from __future__ import annotations

import dataclasses

from redis.asyncio import Redis

from twotower.broker.registry import TTL_MS, Registry, Replica

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
