"""Clients that leave, contexts that die, and too much at once."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.support.gateways import gateway, replica
from tests.support.scripted_context import ScriptedContext
from tests.support.waiting import until
from twotower.client.grpc_client import GatewayClient
from twotower.errors import (
    BrokerUnavailable,
    Draining,
    Incompatible,
    NonFiniteLogits,
    Overloaded,
    RequestFailed,
    TwoTowerError,
    Unavailable,
)
from twotower.events import Block, Finished
from twotower.internal.v1.context_pb2 import OpenRequest
from twotower.request import FinishReason, Mode
from twotower.rpc.channel import open_channel

EOS = 2
SCRIPT = list(range(10, 300))


def hang_at(block: int) -> Callable[[int], Awaitable[None]]:
    async def before(number: int) -> None:
        if number == block:
            await asyncio.Event().wait()

    return before


def fail_at(block: int, error: Exception) -> Callable[[int], Awaitable[None]]:
    async def before(number: int) -> None:
        if number == block:
            raise error

    return before


async def collect(client: GatewayClient, **arguments: object) -> tuple[list[int], Finished]:
    ids: list[int] = []
    async for event in client.generate([5], **arguments):  # type: ignore[arg-type]
        if isinstance(event, Block):
            ids += event.token_ids
        if isinstance(event, Finished):
            return ids, event
    raise AssertionError("no end")


async def test_a_cancelled_generation_ends_at_the_context(checkpoint: Path) -> None:
    context = ScriptedContext(SCRIPT, hang_at(2))
    async with gateway(checkpoint, context) as running, running.client() as client:
        events = client.generate([5])
        async for event in events:
            if isinstance(event, Block) and event.index == 1:
                break
        assert context.running == 1
        await events.aclose()
        await asyncio.wait_for(context.left.wait(), 10)
        assert context.running == 0


async def test_a_deadline_ends_the_work(checkpoint: Path) -> None:
    context = ScriptedContext(SCRIPT, hang_at(1))
    async with gateway(checkpoint, context) as running, running.client() as client:
        with pytest.raises(TwoTowerError, match="deadline passed"):
            await collect(client, timeout_s=0.5)
        await asyncio.wait_for(context.left.wait(), 10)


@pytest.mark.parametrize("mode", [Mode.DIFFUSION, Mode.AR])
@pytest.mark.parametrize("died_at", [0, 1, 3])
async def test_a_session_goes_on_elsewhere_when_its_context_dies(checkpoint: Path, mode: Mode, died_at: int) -> None:
    """The port closes and all calls break, as when the process is killed."""
    doomed, other = ScriptedContext(SCRIPT), ScriptedContext(SCRIPT)

    async def die(number: int) -> None:
        if number == died_at:
            asyncio.get_running_loop().create_task(doomed.stop())
            await asyncio.Event().wait()

    doomed.before = die
    async with gateway(checkpoint, doomed) as running, running.client() as client:
        running.replicas.contexts.append(replica("context", "other", await other.start(), load=5))
        ids, end = await collect(client, max_tokens=21, mode=mode)
    await other.stop()
    assert ids == SCRIPT[:21]  # nothing lost, nothing twice
    assert (end.finish_reason, end.completion_tokens) == (FinishReason.LENGTH, 21)
    size = 1 if mode is Mode.AR else 4
    (request,) = other.opened
    assert request.generated == died_at * size
    assert list(request.prompt.ids) == [5, *SCRIPT[: died_at * size]]
    assert request.params.max_tokens == 21


async def test_logprobs_go_on_where_the_tokens_do(checkpoint: Path) -> None:
    leaving, other = ScriptedContext(SCRIPT, fail_at(2, Unavailable("this context is draining"))), ScriptedContext(SCRIPT)
    async with gateway(checkpoint, leaving) as running, running.client() as client:
        running.replicas.contexts.append(replica("context", "other", await other.start(), load=5))
        blocks = [e async for e in client.generate([5], max_tokens=21, logprobs=0) if isinstance(e, Block)]
    await other.stop()
    assert other.opened[0].generated == 8
    assert [told.logprob for block in blocks for told in block.logprobs] == [-float(place) for place in range(21)]


@pytest.mark.parametrize(
    "code", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED, grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN]
)
async def test_whatever_a_broken_call_is_called(checkpoint: Path, code: grpc.StatusCode) -> None:
    """And a context that is still there, once its channel has connected again."""
    broken = 0

    class Breaks(ScriptedContext):
        async def Open(self, request, context):  # type: ignore[no-untyped-def]
            nonlocal broken
            async for event in super().Open(request, context):
                yield event
                broken += 1
                if broken in (1, 3):
                    await context.abort(code, "made by gRPC")

    async with gateway(checkpoint, Breaks(SCRIPT)) as running, running.client() as client:
        assert (await collect(client, max_tokens=13))[0] == SCRIPT[:13]


async def test_a_draining_context_hands_over(checkpoint: Path) -> None:
    leaving, other = ScriptedContext(SCRIPT, fail_at(2, Unavailable("this context is draining"))), ScriptedContext(SCRIPT)
    async with gateway(checkpoint, leaving) as running, running.client() as client:
        running.replicas.contexts.append(replica("context", "other", await other.start(), load=5))
        assert (await collect(client, max_tokens=20))[0] == SCRIPT[:20]
    await other.stop()
    assert other.opened[0].generated == 8


@pytest.mark.parametrize(("script", "reason"), [(SCRIPT, FinishReason.LENGTH), ([*SCRIPT[:7], EOS], FinishReason.STOP)])
async def test_only_the_word_that_it_is_over_is_lost(checkpoint: Path, script: list[int], reason: FinishReason) -> None:
    context = ScriptedContext(script, fail_at(2, Unavailable("gone")))
    async with gateway(checkpoint, context) as running, running.client() as client:
        ids, end = await collect(client, max_tokens=8)
    assert ids == script[:8]
    assert end.finish_reason is reason
    assert len(context.opened) == 1


async def test_tries_are_bounded(checkpoint: Path) -> None:
    context = ScriptedContext(SCRIPT, fail_at(0, Unavailable("always")))
    others = [ScriptedContext(SCRIPT, context.before) for _ in range(3)]
    async with gateway(checkpoint, context, *others) as running, running.client() as client:
        with pytest.raises(RequestFailed, match="failed 4 times without a block between; the last time: always"):
            await collect(client)


async def test_contexts_that_drain_are_no_failures_of_the_request(checkpoint: Path) -> None:
    """A rolling upgrade: all but one refuse, more of them than a request may fail."""
    draining = [ScriptedContext(SCRIPT, fail_at(0, Draining("this context is draining"))) for _ in range(6)]
    async with gateway(checkpoint, *draining, ScriptedContext(SCRIPT)) as running, running.client() as client:
        ids, _ = await collect(client, max_tokens=20)
        assert ids == SCRIPT[:20]


async def test_contexts_count_on_from_the_failures_before(checkpoint: Path) -> None:
    contexts = [ScriptedContext(SCRIPT, fail_at(0, Unavailable("always"))) for _ in range(4)]
    async with gateway(checkpoint, *contexts) as running, running.client() as client:
        with pytest.raises(RequestFailed):
            await collect(client)
    assert sorted(request.failures for context in contexts for request in context.opened) == [0, 1, 2, 3]


async def test_no_context_comes_back(checkpoint: Path) -> None:
    context = ScriptedContext(SCRIPT, hang_at(1))
    async with gateway(checkpoint, context, reopen_wait_s=0.3) as running, running.client() as client:
        task = asyncio.create_task(collect(client))
        await until(lambda: context.running)
        await context.stop()
        with pytest.raises(Unavailable, match="no context replica became available"):
            await task


@pytest.mark.parametrize(
    "error", [NonFiniteLogits("logits are not finite"), Incompatible("dtype"), BrokerUnavailable("no Redis")]
)
async def test_what_another_context_would_not_mend_is_the_clients_to_know(checkpoint: Path, error: TwoTowerError) -> None:
    context = ScriptedContext(SCRIPT, fail_at(1, error))
    async with gateway(checkpoint, context) as running, running.client() as client:
        with pytest.raises(type(error), match=str(error)):
            await collect(client)
    assert len(context.opened) == 1


async def test_a_full_context_is_passed_over(checkpoint: Path) -> None:
    full, other = ScriptedContext(SCRIPT, fail_at(0, Overloaded("64 sessions"))), ScriptedContext(SCRIPT)
    async with gateway(checkpoint, full) as running, running.client() as client:
        with pytest.raises(Overloaded, match="64 sessions"):
            await collect(client)
        running.replicas.contexts.append(replica("context", "other", await other.start(), load=5))
        while not other.opened:
            try:
                ids, _ = await collect(client, max_tokens=9)
            except Overloaded:
                await asyncio.sleep(0.05)
    await other.stop()
    assert ids == SCRIPT[:9]


async def test_a_session_that_lost_its_context_waits_for_room_on_a_full_one(checkpoint: Path) -> None:
    leaving, full = ScriptedContext(SCRIPT, fail_at(1, Unavailable("this context is draining"))), ScriptedContext(SCRIPT)

    async def full_at_first(number: int) -> None:
        if len(full.opened) < 4:
            raise Overloaded("64 sessions")

    full.before = full_at_first
    async with gateway(checkpoint, leaving) as running, running.client() as client:
        running.replicas.contexts.append(replica("context", "full", await full.start(), load=5))
        assert (await collect(client, max_tokens=9))[0] == SCRIPT[:9]
    await full.stop()
    assert len(full.opened) == 4


async def test_a_context_that_was_full_once_may_be_gone_back_to(checkpoint: Path) -> None:
    first = ScriptedContext(SCRIPT)

    async def full_at_first(number: int) -> None:
        if len(first.opened) == 1:
            raise Overloaded("64 sessions")

    first.before = full_at_first
    dying = ScriptedContext(SCRIPT, fail_at(1, Unavailable("this context is draining")))
    async with gateway(checkpoint, first) as running, running.client() as client:
        running.replicas.contexts.append(replica("context", "dying", await dying.start(), load=5))
        while not dying.opened:
            first.opened.clear()
            try:
                ids, _ = await collect(client, max_tokens=9)
            except Overloaded:  # the other one is not known yet
                await asyncio.sleep(0.05)
    await dying.stop()
    assert ids == SCRIPT[:9]
    assert len(first.opened) == 2


async def test_sessions_spread_over_contexts_by_load(checkpoint: Path) -> None:
    contexts = [ScriptedContext(SCRIPT, hang_at(1)) for _ in range(3)]
    async with gateway(checkpoint, *contexts) as running, running.client() as client:
        tasks = [asyncio.create_task(collect(client)) for _ in range(9)]
        await until(lambda: sum(context.running for context in contexts) == 9)
        assert [context.running for context in contexts] == [3, 3, 3]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def test_too_much_at_once_is_refused_and_room_comes_back(checkpoint: Path) -> None:
    context = ScriptedContext(SCRIPT, hang_at(1))
    async with gateway(checkpoint, context, max_in_flight=2) as running, running.client() as client:
        held = [asyncio.create_task(collect(client)) for _ in range(2)]
        await until(lambda: context.running == 2)
        with pytest.raises(Overloaded, match="2 requests are in flight"):
            await collect(client)
        held[0].cancel()
        await asyncio.wait(held[:1])
        await until(lambda: context.running == 1)
        context.before = hang_at(1000)
        assert (await collect(client, max_tokens=8))[0] == SCRIPT[:8]
        held[1].cancel()
        await asyncio.gather(*held, return_exceptions=True)


async def test_64_streams_at_once_do_not_mix(checkpoint: Path) -> None:
    async def turns(block: int) -> None:
        await asyncio.sleep(0)

    class Echoes(ScriptedContext):
        def tokens_of(self, request: OpenRequest) -> list[int]:
            return [request.prompt.ids[0]] * 100

    async with gateway(checkpoint, Echoes([], turns), Echoes([], turns)) as running, running.client() as client:

        async def one(token: int) -> list[int]:
            return [t async for e in client.generate([token], max_tokens=50) if isinstance(e, Block) for t in e.token_ids]

        results = await asyncio.gather(*(one(100 + i) for i in range(64)))
    assert results == [[100 + i] * 50 for i in range(64)]


async def test_a_drain_lets_requests_finish_and_refuses_new_ones(checkpoint: Path) -> None:
    go_on = asyncio.Event()

    async def before(number: int) -> None:
        if number == 1:
            await go_on.wait()

    context = ScriptedContext(SCRIPT, before)
    async with gateway(checkpoint, context) as running, running.client() as client:
        held = asyncio.create_task(collect(client, max_tokens=12))
        await until(lambda: context.running)
        running.stop.set()
        async with asyncio.timeout(10), open_channel(running.grpc) as channel:
            health, asked = health_pb2_grpc.HealthStub(channel), health_pb2.HealthCheckRequest()
            while (await health.Check(asked)).status != health_pb2.HealthCheckResponse.NOT_SERVING:
                pass  # it takes a moment
        with pytest.raises(Unavailable, match="is not ready"):
            await client.wait_ready(0.3)
        with pytest.raises(Unavailable, match="shutting down"):
            await collect(client)
        go_on.set()
        assert (await held)[0] == SCRIPT[:12]
        await asyncio.wait_for(running.task, 10)


async def test_a_drain_does_not_wait_for_ever(checkpoint: Path) -> None:
    context = ScriptedContext(SCRIPT, hang_at(1))
    async with gateway(checkpoint, context, drain_s=0.2) as running, running.client() as client:
        held = asyncio.create_task(collect(client))
        await until(lambda: context.running)
        running.stop.set()
        await asyncio.wait_for(running.task, 20)
        with pytest.raises(TwoTowerError):
            await held
        await asyncio.wait_for(context.left.wait(), 10)


async def test_the_last_snapshot_outlives_redis_for_a_while(checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    context = ScriptedContext(SCRIPT)
    async with gateway(checkpoint, context, snapshot_keep_s=2.5, reopen_wait_s=0.2) as running, running.client() as client:
        running.replicas.error = BrokerUnavailable("Redis at redis://x does not answer")
        await until(lambda: "does not answer" in caplog.text)
        assert (await collect(client, max_tokens=8))[0] == SCRIPT[:8]
        with pytest.raises(Unavailable, match="no context replica is live"):  # noqa: PT012
            while True:
                await collect(client, max_tokens=8)
                await asyncio.sleep(0.1)
        running.replicas.error = None
        await client.wait_ready(10)
        assert (await collect(client, max_tokens=8))[0] == SCRIPT[:8]
    assert caplog.text.count("does not answer") == 1


async def test_a_context_that_announces_its_drain_gets_no_sessions(checkpoint: Path) -> None:
    leaving, other = ScriptedContext(SCRIPT), ScriptedContext(SCRIPT)
    drains = dataclasses.replace(replica("context", "leaving", await leaving.start(), load=-1), capacity=0)
    async with gateway(checkpoint, other, replicas=[drains]) as running, running.client() as client:
        assert (await collect(client, max_tokens=5))[0] == SCRIPT[:5]
    await leaving.stop()
    assert (len(leaving.opened), len(other.opened)) == (0, 1)
