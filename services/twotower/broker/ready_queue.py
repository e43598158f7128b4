"""The queue of sessions that are ready to denoise: a Redis stream for each priority; workers pull from all as one group.

An entry only names where a session waits; the context hands out the session itself, and the right to work on it.
So an entry that is delivered twice, or too late, does no harm: the context refuses its lease.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from redis.asyncio import Redis
from redis.exceptions import RedisError, ResponseError

from twotower.broker.connection import broker_errors
from twotower.broker.keys import ready_stream
from twotower.errors import BrokerUnavailable
from twotower.request import Priority

log = logging.getLogger(__name__)

GROUP = "denoisers"
CLAIM_IDLE_MS = 5_000
"""An entry that was delivered this long ago and not removed since belongs to a worker that died."""
PUSH_WAIT_S = 15.0
"""How long a session waits for a Redis that is away: longer than a restart of Redis takes."""
PUSH_RETRY_S = 0.2
FORGET_IDLE_MS = 3_600_000
"""A worker that got no entry for this long, and holds none, is forgotten; if it lives, its next entry registers it again."""
FORGET_WORKERS = """
for _, stream in ipairs(KEYS) do
    for _, worker in ipairs(redis.call('XINFO', 'CONSUMERS', stream, ARGV[1])) do
        local is = {}
        for i = 1, #worker, 2 do is[worker[i]] = worker[i + 1] end
        if is.pending == 0 and is.idle > tonumber(ARGV[2]) then
            redis.call('XGROUP', 'DELCONSUMER', stream, ARGV[1], is.name)
        end
    end
end
"""
"""Runs in the server, so that no entry is delivered in between, which would be lost with its worker."""


class EntryId(NamedTuple):
    """Identifies an entry of the queue."""

    priority: Priority
    number: str


@dataclass(frozen=True, slots=True)
class ReadySession:
    """An entry's content: where a session waits."""

    session_id: str
    lease: int
    """How many times the session was queued; only the newest entry is valid."""
    context_address: str
    tokens: int
    """The tokens that its state must have room for."""


Pulled = list[tuple[EntryId, ReadySession]]

PRIORITIES = tuple(sorted(Priority, reverse=True))


class ReadyQueue:
    """The streams of one checkpoint, and their consumer group. All methods raise BrokerUnavailable.

    A session costs two round trips: its push, and the pull that delivers it, which also removes entries that are done.
    """

    def __init__(self, redis: Redis, identity: str, claim_idle_ms: int = CLAIM_IDLE_MS) -> None:
        self._redis = redis
        self._claim_idle_ms = claim_idle_ms
        self._streams = {priority: ready_stream(identity, priority) for priority in PRIORITIES}
        self._priorities = {stream: priority for priority, stream in self._streams.items()}
        self._next_claim = 0.0
        self._done: list[EntryId] = []
        self._pulling = False

    async def push(self, entry: ReadySession, priority: Priority = Priority.NORMAL, *, wait_s: float = PUSH_WAIT_S) -> EntryId:
        """Queue a session; returns the entry's id. While Redis is away, this retries for up to `wait_s` seconds.

        If only Redis's answer was lost, the session is queued twice, which does no harm.
        """
        fields: dict[Any, Any] = {
            "session": entry.session_id,
            "lease": entry.lease,
            "context": entry.context_address,
            "tokens": entry.tokens,
        }
        clock = asyncio.get_running_loop().time
        give_up = clock() + wait_s
        while True:
            try:
                with broker_errors():
                    return EntryId(priority, str(await self._redis.xadd(self._streams[priority], fields)))
            except BrokerUnavailable:
                if clock() >= give_up:
                    raise
                await asyncio.sleep(PUSH_RETRY_S)

    async def pull(self, worker_id: str, count: int, wait_s: float) -> Pulled:
        """Returns about `count` sessions, and waits in the server, up to `wait_s` seconds, for the first.

        The server applies the count to each priority separately, so that for a `count` below 3 up to 3 can come, the most
        urgent first. Every entry must be passed to `done_soon` or `done`, whatever its outcome. Entries of workers that
        died are taken over.
        """
        self._pulling = True
        try:
            with broker_errors():
                try:
                    now = asyncio.get_running_loop().time()
                    if now >= self._next_claim:
                        self._next_claim = now + self._claim_idle_ms / 1000
                        if claimed := await self._claim(worker_id, count):
                            return claimed
                        await self._redis.eval(FORGET_WORKERS, len(PRIORITIES), *self._streams.values(), GROUP, FORGET_IDLE_MS)
                    return await self._read(worker_id, count, wait_s)
                except ResponseError as error:
                    if not str(error).startswith(("NOGROUP", "UNBLOCKED", "ERR no such key")):
                        raise
                    await self._make_groups()  # this is the first worker, or Redis lost the groups, perhaps while we waited
                    return []
        finally:
            self._pulling = False

    async def done(self, *entries: EntryId) -> None:
        """Remove entries, delivered or not. It takes one round trip."""
        with broker_errors():
            async with self._redis.pipeline(transaction=False) as pipe:
                self._take_off(pipe, entries)
                await pipe.execute()

    def done_soon(self, entry: EntryId) -> None:
        """Remove an entry with the next pull."""
        self._done.append(entry)

    async def flush(self) -> None:
        """Remove the entries that wait for the next pull, unless one is under way: for a full worker, which does not pull."""
        if self._done and not self._pulling:
            done, self._done = self._done, []
            await self.done(*done)

    async def contains(self, entry: EntryId) -> bool:
        """Whether an entry is still in the queue, delivered or not."""
        with broker_errors():
            return bool(await self._redis.xrange(self._streams[entry.priority], entry.number, entry.number))

    async def depth(self) -> int:
        """The number of entries, delivered or not."""
        with broker_errors():
            async with self._redis.pipeline(transaction=False) as pipe:
                for stream in self._streams.values():
                    pipe.xlen(stream)
                return sum(await pipe.execute())

    async def _read(self, worker_id: str, count: int, wait_s: float) -> Pulled:
        """Remove entries that are done, and wait for new ones, in one round trip."""
        done, self._done = self._done, []
        streams: dict[Any, Any] = dict.fromkeys(self._streams.values(), ">")
        each = max(1, count // len(PRIORITIES))
        try:
            async with self._redis.pipeline(transaction=False) as pipe:
                self._take_off(pipe, done)
                pipe.xreadgroup(GROUP, worker_id, streams, count=each, block=max(1, round(wait_s * 1000)))
                *_, answer = await pipe.execute(raise_on_error=False)
        except (RedisError, OSError):
            self._done += done
            raise
        if isinstance(answer, Exception):
            raise answer
        return await self._parsed((self._priorities[stream], entry) for stream, entries in answer or () for entry in entries)

    def _take_off(self, pipe: Any, entries: Iterable[EntryId]) -> None:
        """Acknowledge and delete, a command each for every priority."""
        for priority, stream in self._streams.items():
            if numbers := [entry.number for entry in entries if entry.priority is priority]:
                pipe.xack(stream, GROUP, *numbers)
                pipe.xdel(stream, *numbers)

    async def _claim(self, worker_id: str, count: int) -> Pulled:
        found: list[tuple[Priority, Any]] = []
        for priority, stream in self._streams.items():
            left = count - len(found)
            if left > 0:
                answer: Any = await self._redis.xautoclaim(stream, GROUP, worker_id, self._claim_idle_ms, count=left)
                found += ((priority, entry) for entry in answer[1] if entry[1])
        return await self._parsed(found)

    async def _parsed(self, entries: Iterable[tuple[Priority, Any]]) -> Pulled:
        """Parse entries; those that are not ours are removed, so that no worker gets them again."""
        out: Pulled = []
        for priority, (number, fields) in entries:
            entry = EntryId(priority, number)
            try:
                ready = ReadySession(fields["session"], int(fields["lease"]), fields["context"], int(fields["tokens"]))
            except (KeyError, ValueError, TypeError):
                log.warning("entry %s of the ready queue is no session: dropped", number)
                await self.done(entry)
                continue
            out.append((entry, ready))
        return out

    async def _make_groups(self) -> None:
        for stream in self._streams.values():
            try:
                await self._redis.xgroup_create(stream, GROUP, id="0", mkstream=True)
            except ResponseError as error:
                if not str(error).startswith("BUSYGROUP"):  # another worker was faster
                    raise
