"""The queue of ready sessions, against real servers."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from redis.asyncio import Redis
from redis.asyncio.connection import AbstractConnection

from tests.support.redis_server import embedded_redis
from twotower.broker.connection import connect
from twotower.broker.ready_queue import EntryId, Pulled, ReadyQueue, ReadySession
from twotower.errors import BrokerUnavailable
from twotower.request import Priority

NEVER = EntryId(Priority.NORMAL, "0-1")


def _session(number: int) -> ReadySession:
    return ReadySession(f"session-{number}", number, f"127.0.0.1:{number}", 64)


async def _pull_some(queue: ReadyQueue, worker: str, count: int = 10) -> Pulled:
    """The first pull ever makes the group, and comes back empty."""
    return await queue.pull(worker, count, 0.05) or await queue.pull(worker, count, 0.05)


async def test_what_is_pushed_is_pulled_once_in_order(redis: Redis) -> None:
    queue = ReadyQueue(redis, "abc")
    for number in range(5):
        await queue.push(_session(number))
    first = await _pull_some(queue, "a", 6)
    second = await _pull_some(queue, "b")
    assert [ready for _, ready in first + second] == [_session(number) for number in range(5)]
    assert await queue.pull("a", 10, 0.01) == []


async def test_nothing_is_left_of_what_is_done(redis: Redis) -> None:
    queue = ReadyQueue(redis, "abc")
    entry_id = await queue.push(_session(1))
    never_pulled = await queue.push(_session(2))
    assert await queue.contains(entry_id)
    ((pulled, _),) = await _pull_some(queue, "a", 1)
    assert pulled == entry_id
    for done in (pulled, never_pulled, pulled):
        await queue.done(done)
    assert not await queue.contains(entry_id)
    assert await queue.depth() == 0
    assert (await redis.xpending("twotower:abc:ready:normal", "denoisers"))["pending"] == 0


async def test_an_entry_that_is_no_session_is_dropped_and_stops_no_one(redis: Redis) -> None:
    queue = ReadyQueue(redis, "abc")
    stream = "twotower:abc:ready:normal"
    for fields in ({"from": "another version"}, {"session": "s", "lease": "soon", "context": "c", "tokens": "1"}):
        await redis.xadd(stream, fields)  # type: ignore[arg-type]
    await queue.push(_session(1))
    assert [ready for _, ready in await _pull_some(queue, "a")] == [_session(1)]
    assert await queue.depth() == 1


async def test_a_pull_waits_for_a_push(redis: Redis) -> None:
    queue = ReadyQueue(redis, "abc")
    await queue.pull("a", 1, 0.01)
    waiting = asyncio.create_task(queue.pull("a", 1, 5))
    await asyncio.sleep(0.05)
    await queue.push(_session(7))
    assert [ready for _, ready in await waiting] == [_session(7)]


async def test_many_workers_get_each_session_once(redis: Redis) -> None:
    queue = ReadyQueue(redis, "abc")
    got: list[ReadySession] = []

    async def work(name: str) -> None:
        while len(got) < 200:
            for entry_id, ready in await queue.pull(name, 3, 0.05):
                got.append(ready)
                await queue.done(entry_id)

    workers = [asyncio.create_task(work(f"w{i}")) for i in range(5)]
    await asyncio.gather(*(queue.push(_session(number)) for number in range(200)))
    async with asyncio.timeout(20):
        await asyncio.gather(*workers)
    assert sorted(ready.lease for ready in got) == list(range(200))
    assert await queue.depth() == 0


async def test_what_a_dead_worker_held_is_claimed(redis: Redis) -> None:
    queue = ReadyQueue(redis, "abc", claim_idle_ms=50)
    await queue.push(_session(1))
    assert await _pull_some(queue, "dead")
    successor = ReadyQueue(redis, "abc", claim_idle_ms=50)
    await asyncio.sleep(0.1)
    assert [ready for _, ready in await successor.pull("alive", 5, 0.01)] == [_session(1)]


async def test_a_server_that_forgot_everything(redis: Redis) -> None:
    queue = ReadyQueue(redis, "abc")
    entry_id = await queue.push(_session(1))
    await _pull_some(queue, "a")
    await redis.flushall()
    assert not await queue.contains(entry_id)
    await queue.done(entry_id)
    await queue.push(_session(2))
    assert [ready for _, ready in await _pull_some(queue, "a")] == [_session(2)]


async def test_checkpoints_do_not_mix(redis: Redis) -> None:
    await ReadyQueue(redis, "abc").push(_session(1))
    assert await _pull_some(ReadyQueue(redis, "abd"), "a") == []


async def test_a_server_that_is_gone() -> None:
    async with embedded_redis() as server:
        client = await connect(server.url)
    queue = ReadyQueue(client, "abc")
    for call in (queue.push(_session(1), wait_s=0.3), queue.pull("a", 1, 0.01), queue.done(NEVER), queue.contains(NEVER)):
        with pytest.raises(BrokerUnavailable):
            await call
    await client.aclose()


async def test_a_push_waits_for_a_server_that_is_started_again() -> None:
    async with embedded_redis() as server:
        client = await connect(server.url)
        queue = ReadyQueue(client, "abc")
        assert server.process is not None
        await server.process.kill()
        pushing = asyncio.create_task(queue.push(_session(1)))
        await asyncio.sleep(0.5)
        assert not pushing.done()
        await server.restart()
        entry = await pushing
        assert [pulled for pulled, _ in await _pull_some(queue, "a")] == [entry]
        await client.aclose()


async def test_a_server_that_forgets_while_a_worker_waits(redis: Redis) -> None:
    queue = ReadyQueue(redis, "abc")
    await _pull_some(queue, "a")
    waiting = asyncio.create_task(queue.pull("a", 1, 5))
    await asyncio.sleep(0.05)
    await redis.flushall()
    assert await waiting == []
    await queue.push(_session(1))
    assert await queue.pull("a", 1, 0.05) or await queue.pull("a", 1, 0.05)


async def test_workers_that_are_gone_are_forgotten(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """But not one that holds an entry, which must be claimed first."""
    queue = ReadyQueue(redis, "abc", claim_idle_ms=60_000)
    for number, worker in enumerate(("gone", "dead")):
        await queue.push(_session(number))
        ((entry_id, _),) = await _pull_some(queue, worker)
        if worker == "gone":
            await queue.done(entry_id)
    monkeypatch.setattr("twotower.broker.ready_queue.FORGET_IDLE_MS", 20)
    await asyncio.sleep(0.05)
    await ReadyQueue(redis, "abc", claim_idle_ms=60_000).pull("here", 1, 0.01)
    workers = await redis.xinfo_consumers("twotower:abc:ready:normal", "denoisers")
    assert {worker["name"] for worker in workers} - {"here"} == {"dead"}


async def test_the_most_urgent_come_first(redis: Redis) -> None:
    queue = ReadyQueue(redis, "abc")
    for number, priority in enumerate((Priority.LOW, Priority.NORMAL, Priority.HIGH, Priority.HIGH)):
        await queue.push(_session(number), priority)
    pulled = await _pull_some(queue, "a", 6)
    assert [entry.priority for entry, _ in pulled] == [Priority.HIGH, Priority.HIGH, Priority.NORMAL, Priority.LOW]
    assert [ready.lease for _, ready in pulled] == [2, 3, 1, 0]
    await queue.done(*(entry for entry, _ in pulled))
    assert await queue.depth() == 0


async def test_what_is_done_goes_with_the_next_pull_or_when_flushed(redis: Redis) -> None:
    queue = ReadyQueue(redis, "abc")
    for number in range(2):
        await queue.push(_session(number))
    (first, _), (second, _) = await _pull_some(queue, "a", 6)
    queue.done_soon(first)
    assert await queue.depth() == 2
    await queue.pull("a", 1, 0.01)
    assert await queue.depth() == 1
    queue.done_soon(second)
    waiting = asyncio.create_task(queue.pull("a", 1, 0.2))
    await asyncio.sleep(0)
    queue.done_soon(first)  # twice does no harm
    await queue.flush()  # a pull is under way
    await waiting
    await queue.flush()
    assert await queue.depth() == 0
    assert (await redis.xpending("twotower:abc:ready:normal", "denoisers"))["pending"] == 0


async def test_a_session_costs_two_round_trips(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many are pushed and pulled, nothing else is asked of the server, but to claim what dead workers left."""
    queue = ReadyQueue(redis, "abc", claim_idle_ms=3_600_000)
    await _pull_some(queue, "a")
    trips = 0
    send = AbstractConnection.send_packed_command

    async def count(self: AbstractConnection, *args: Any, **kwargs: Any) -> None:
        nonlocal trips
        trips += 1
        await send(self, *args, **kwargs)

    monkeypatch.setattr(AbstractConnection, "send_packed_command", count)
    for number in range(20):
        await queue.push(_session(number))
        ((entry, _),) = await queue.pull("a", 1, 1)
        queue.done_soon(entry)
    assert trips == 40
