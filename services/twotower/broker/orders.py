"""Replicas as an operator sees them: by name, of whatever checkpoint, told to drain or to serve."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

from redis.asyncio import Redis

from twotower.broker import keys
from twotower.broker.connection import broker_errors
from twotower.broker.registry import KINDS, Registry, Replica
from twotower.errors import ConfigError

_INDEX = re.compile(re.escape(keys.replicas("\0", "\0")).replace(re.escape("\0"), "(.+)"))


async def everybody(redis: Redis) -> list[Replica]:
    """All replicas of all checkpoints that live. Raises BrokerUnavailable."""
    found = []
    with broker_errors():
        indexes: Any = [index async for index in redis.scan_iter(match=keys.replicas("*", "*"))]
    for index in sorted(indexes):
        if (parts := _INDEX.fullmatch(index)) is not None and (kind := parts[2]) in KINDS:
            found += await Registry(redis, parts[1]).replicas(kind)
    return found


def named(replicas: Collection[Replica], names: Collection[str]) -> list[Replica]:
    """The replicas with these names, or addresses. Raises ConfigError for one that nobody has."""
    chosen = []
    for name in names:
        matching = [replica for replica in replicas if name in (replica.name, replica.address)]
        if not matching:
            known = ", ".join(replica.name for replica in replicas) or "nobody"
            raise ConfigError(f"name: no replica {name!r} is live; these are: {known}")
        chosen += [replica for replica in matching if replica not in chosen]
    return chosen


async def order(redis: Redis, replica: Replica, *, drain: bool) -> None:
    """Have a replica drain, or go on serving. Raises BrokerUnavailable."""
    await Registry(redis, replica.identity).order(replica.kind, replica.name, drain=drain)


async def seen(redis: Redis, replica: Replica) -> Replica | None:
    """What the replica says now; None: it has gone. Raises BrokerUnavailable."""
    replicas = await Registry(redis, replica.identity).replicas(replica.kind)
    return next((one for one in replicas if one.name == replica.name), None)
