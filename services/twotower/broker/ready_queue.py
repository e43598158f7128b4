"""The queue of sessions that are ready to denoise: a Redis stream that workers pull from as one group.

An entry only says where a session waits; the session itself, and the right to work on it, are the context's to
give. So an entry that is delivered twice, or too late, does no harm: the context refuses its lease.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import ResponseError

from twotower.broker.connection import broker_errors
from twotower.broker.keys import ready_stream

log = logging.getLogger(__name__)

GROUP = "denoisers"
CLAIM_IDLE_MS = 5_000
"""An entry that was delivered this long ago and never taken off belongs to a worker that died."""
FORGET_IDLE_MS = 3_600_000
"""A worker that was given nothing this long, and holds nothing, may be gone; if not, it is known again with its next entry."""
FORGET_WORKERS = """
for _, worker in ipairs(redis.call('XINFO', 'CONSUMERS', KEYS[1], ARGV[1])) do
    local is = {}
    for i = 1, #worker, 2 do is[worker[i]] = worker[i + 1] end
    if is.pending == 0 and is.idle > tonumber(ARGV[2]) then
        redis.call('XGROUP', 'DELCONSUMER', KEYS[1], ARGV[1], is.name)
    end
end
"""
"""In the server, so that no entry is delivered in between: it would be lost with its worker."""


@dataclass(frozen=True, slots=True)
class ReadySession:
    """Where a session waits."""

    session_id: str
    lease: int
    """Counts how often the session was queued; only the newest entry is good."""
    context_address: str


class ReadyQueue:
    """One stream and one consumer group per checkpoint. All methods raise BrokerUnavailable."""

    def __init__(self, redis: Redis, identity: str, claim_idle_ms: int = CLAIM_IDLE_MS) -> None:
        self._redis = redis
        self._claim_idle_ms = claim_idle_ms
        self._stream = ready_stream(identity)
        self._next_claim = 0.0

    async def push(self, entry: ReadySession) -> str:
        """Queue a session; returns the entry's id."""
        fields: dict[Any, Any] = {"session": entry.session_id, "lease": entry.lease, "context": entry.context_address}
        with broker_errors():
            return str(await self._redis.xadd(self._stream, fields))

    async def pull(self, worker_id: str, count: int, wait_s: float) -> list[tuple[str, ReadySession]]:
        """Up to `count` sessions, waiting up to `wait_s` seconds, in the server, for the first.

        Every entry must be given back by `done`, whatever came of it. Entries of workers that died are
        taken over.
        """
        with broker_errors():
            try:
                now = asyncio.get_running_loop().time()
                if now >= self._next_claim:
                    self._next_claim = now + self._claim_idle_ms / 1000
                    if claimed := await self._claim(worker_id, count):
                        return claimed
                    await self._forget_workers()
                answer: Any = await self._redis.xreadgroup(
                    GROUP, worker_id, {self._stream: ">"}, count=count, block=max(1, round(wait_s * 1000))
                )
            except ResponseError as error:
                if not str(error).startswith(("NOGROUP", "UNBLOCKED")):  # UNBLOCKED: lost it while we waited
                    raise
                await self._make_group()  # the first worker ever, or Redis lost it
                return []
        return await self._parsed(entry for _, entries in answer or () for entry in entries)

    async def done(self, entry_id: str) -> None:
        """Take an entry off, delivered or not. One round trip."""
        with broker_errors():
            async with self._redis.pipeline(transaction=True) as pipe:
                pipe.xack(self._stream, GROUP, entry_id)
                pipe.xdel(self._stream, entry_id)
                await pipe.execute()

    async def contains(self, entry_id: str) -> bool:
        """Whether an entry is still there, delivered or not."""
        with broker_errors():
            return bool(await self._redis.xrange(self._stream, entry_id, entry_id))

    async def depth(self) -> int:
        """Entries that are there, delivered or not."""
        with broker_errors():
            return int(await self._redis.xlen(self._stream))

    async def _claim(self, worker_id: str, count: int) -> list[tuple[str, ReadySession]]:
        answer: Any = await self._redis.xautoclaim(self._stream, GROUP, worker_id, self._claim_idle_ms, count=count)
        return await self._parsed(entry for entry in answer[1] if entry[1])

    async def _parsed(self, entries: Iterable[Any]) -> list[tuple[str, ReadySession]]:
        """What is none of ours is taken off, so that no worker meets it again."""
        out = []
        for entry_id, fields in entries:
            try:
                out.append((entry_id, ReadySession(fields["session"], int(fields["lease"]), fields["context"])))
            except (KeyError, ValueError, TypeError):
                log.warning("entry %s of the ready queue is no session: dropped", entry_id)
                await self.done(entry_id)
        return out

    async def _forget_workers(self) -> None:
        """Names of workers that are gone would pile up, one for each that ever was."""
        await self._redis.eval(FORGET_WORKERS, 1, self._stream, GROUP, FORGET_IDLE_MS)

    async def _make_group(self) -> None:
        try:
            await self._redis.xgroup_create(self._stream, GROUP, id="0", mkstream=True)
        except ResponseError as error:
            if not str(error).startswith("BUSYGROUP"):  # another worker was faster
                raise
