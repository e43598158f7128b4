"""The queue of ready sessions, against real servers."""

from __future__ import annotations

import asyncio

import pytest
from redis.asyncio import Redis

from tests.support.redis_server import embedded_redis
from twotower.broker.connection import connect
from twotower.broker.ready_queue import ReadyQueue, ReadySession
from twotower.errors import BrokerUnavailable


def _session(number: int) -> ReadySession:
    return ReadySession(f"session-{number}", number, f"127.0.0.1:{number}")


async def _pull_some(queue: ReadyQueue, worker: str, count: int = 10) -> list[tuple[str, ReadySession]]:
    """The first pull ever makes the group, and comes back empty."""
    return await queue.pull(worker, count, 0.05) or await queue.pull(worker, count, 0.05)


async def test_what_is_pushed_is_pulled_once_in_order(redis: Redis) -> None:
    queue = ReadyQueue(redis, "abc")
    for number in range(5):
        await queue.push(_session(number))
    first = await _pull_some(queue, "a", 3)
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
    assert (await redis.xpending("twotower:abc:ready", "denoisers"))["pending"] == 0


async def test_an_entry_that_is_no_session_is_dropped_and_stops_no_one(redis: Redis) -> None:
    queue = ReadyQueue(redis, "abc")
    stream = "twotower:abc:ready"
    for fields in ({"from": "another version"}, {"session": "s", "lease": "soon", "context": "c"}):
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
    for call in (queue.push(_session(1)), queue.pull("a", 1, 0.01), queue.done("0-1"), queue.contains("0-1")):
        with pytest.raises(BrokerUnavailable):
            await call
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
    workers = await redis.xinfo_consumers("twotower:abc:ready", "denoisers")
    assert {worker["name"] for worker in workers} - {"here"} == {"dead"}
