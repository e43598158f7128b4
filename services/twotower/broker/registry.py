"""Who is alive: each replica announces itself once a second, under a key that expires."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Literal

from redis.asyncio import Redis

from twotower.broker import keys
from twotower.broker.connection import broker_errors

Kind = Literal["context", "denoiser"]

TTL_MS = 5_000


@dataclass(frozen=True, slots=True)
class Replica:
    """A context or a denoiser, as it last described itself."""

    kind: Kind
    name: str
    address: str
    """Where its gRPC server is reached."""
    identity: str
    """Of the checkpoint it serves."""
    load: int
    """Sessions it holds."""
    capacity: int
    """Sessions it takes; 0 while it drains."""


class Registry:
    """Replicas of one checkpoint. All methods raise BrokerUnavailable."""

    def __init__(self, redis: Redis, identity: str) -> None:
        self._redis = redis
        self._identity = identity

    async def announce(self, replica: Replica) -> None:
        """Say that `replica` lives, for the next `TTL_MS`."""
        with broker_errors():
            await self._redis.set(self._key(replica), json.dumps(dataclasses.asdict(replica)), px=TTL_MS)

    async def withdraw(self, replica: Replica) -> None:
        """It takes no more work."""
        with broker_errors():
            await self._redis.delete(self._key(replica))

    async def replicas(self, kind: str) -> list[Replica]:
        """All that live, by name."""
        with broker_errors():
            names = [key async for key in self._redis.scan_iter(match=keys.replica(self._identity, kind, "*"), count=1000)]
            values = await self._redis.mget(names) if names else []
        return sorted((Replica(**json.loads(value)) for value in values if value), key=lambda replica: replica.name)

    def _key(self, replica: Replica) -> str:
        return keys.replica(self._identity, replica.kind, replica.name)
