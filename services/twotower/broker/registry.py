"""The replicas that are alive: each announces itself once a second, under a key that expires."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any, Literal

from redis.asyncio import Redis

from twotower.broker import keys
from twotower.broker.connection import broker_errors

ReplicaKind = Literal["context", "denoiser", "gateway"]
KINDS: tuple[ReplicaKind, ...] = ("gateway", "context", "denoiser")

TTL_MS = 5_000
ORDER_TTL_MS = 30_000
"""An order that nobody has taken by then has nobody to take it."""
DRAIN, SERVE = "drain", "serve"


@dataclass(frozen=True, slots=True)
class Replica:
    """A context, a denoiser or a gateway, as it last described itself."""

    kind: ReplicaKind
    name: str
    address: str
    """Where its gRPC server is reached."""
    identity: str
    """The identity of the checkpoint that it serves."""
    load: int
    """Sessions it holds; a gateway: requests."""
    capacity: int
    """The most sessions it takes; 0 while it drains."""
    dtype: str = ""
    """The dtype it computes in: float32 or bfloat16."""
    chunk_tokens: int = 0
    """Tokens of a chunk of its prefix cache; 0: it has no prefix cache."""
    prefixes: str = ""
    """Which prefixes it holds states of (see `prefix.chain.pack_links`), those that repeat first."""
    draining: bool = False
    waiting: int = 0
    """Sessions, or requests that a gateway holds, that wait for a denoiser."""
    oldest_s: float = 0.0
    """How long the oldest of these has waited."""
    unread: int = 0
    """Sessions whose prompt is not read yet, or requests that a gateway holds, that wait for a context."""
    unread_s: float = 0.0
    """How long the oldest of these has waited."""
    leaving_per_s: float = 0.0
    """Sessions that left it, a second, of late."""
    refining: int = 0
    """Blocks that a denoiser is working on."""
    refine_s: float = 0.0
    """Mean seconds from a block's start to its end on a denoiser, of late; 0: unknown."""
    commit_s: float = 0.0
    """Mean seconds from a block's end until the session's next one can start, of late; 0: unknown."""
    tokens_per_forward: float = 0.0
    """Of a denoiser, of late; 0: unknown."""
    sick: str = ""
    """Why a denoiser that answers should not be trusted; empty: nothing is known against it."""


class Registry:
    """The replicas of one checkpoint. All methods raise BrokerUnavailable."""

    def __init__(self, redis: Redis, identity: str) -> None:
        self._redis = redis
        self._identity = identity

    async def announce(self, replica: Replica) -> bool | None:
        """Say that `replica` lives, for the next `TTL_MS`.

        Returns its standing order: to drain, or not to; None: there is none.
        """
        names = keys.replicas(self._identity, replica.kind)
        with broker_errors():
            async with self._redis.pipeline(transaction=False) as pipe:
                pipe.set(self._key(replica), json.dumps(dataclasses.asdict(replica)), px=TTL_MS)
                pipe.sadd(names, replica.name)
                pipe.pexpire(names, TTL_MS)  # with the last replica goes all
                pipe.get(keys.order(self._identity, replica.kind, replica.name))
                *_, order = await pipe.execute()
        return {DRAIN: True, SERVE: False}.get(order)

    async def order(self, kind: ReplicaKind, name: str, *, drain: bool) -> None:
        """Have a replica drain, or call its drain off. It obeys within about a second."""
        with broker_errors():
            await self._redis.set(keys.order(self._identity, kind, name), DRAIN if drain else SERVE, px=ORDER_TTL_MS)

    async def withdraw(self, replica: Replica) -> None:
        """Remove the announcement of a replica that takes no more work."""
        with broker_errors():
            async with self._redis.pipeline(transaction=False) as pipe:
                pipe.delete(self._key(replica), keys.order(self._identity, replica.kind, replica.name))
                pipe.srem(keys.replicas(self._identity, replica.kind), replica.name)
                await pipe.execute()

    async def replicas(self, kind: ReplicaKind) -> list[Replica]:
        """All live replicas, sorted by name. The cost grows with their number only, not with the server's other content."""
        index = keys.replicas(self._identity, kind)
        with broker_errors():
            members: Any = await self._redis.smembers(index)
            names = sorted(members)
            values = await self._redis.mget([keys.replica(self._identity, kind, name) for name in names]) if names else []
            if dead := [name for name, value in zip(names, values, strict=True) if value is None]:
                await self._redis.srem(index, *dead)  # a replica that lives after all announces itself again within a second
        return [replica for value in values if value is not None and (replica := _parse(value)) is not None]

    def _key(self, replica: Replica) -> str:
        return keys.replica(self._identity, replica.kind, replica.name)


def _parse(value: str | bytes) -> Replica | None:
    """A replica from its announcement, even by a version with more or fewer fields; None if it is not ours."""
    try:
        said = json.loads(value)
        return Replica(**{field.name: said[field.name] for field in dataclasses.fields(Replica) if field.name in said})
    except (ValueError, KeyError, TypeError):
        return None
