"""Context and workers together: what is generated, and what remains, when all goes well and when it does not."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch

from tests.support.checkpoints import write_tiny_checkpoint
from tests.support.towers import RunningWorker, Towers, towers
from tests.support.waiting import until
from twotower.context import sessions as context_sessions
from twotower.context.live import LiveSession
from twotower.context.sessions import MAX_FAILURES
from twotower.engine.local import LocalEngine
from twotower.engine.refinement import Refinement
from twotower.engine.session import Session
from twotower.internal.v1 import context_pb2, link_pb2
from twotower.model.delta_batch import DeltaBatch
from twotower.model.state import ContextState
from twotower.request import GenerationParams, Mode, TokenLogprob
from twotower.v1 import inference_pb2
from twotower.wire.handshake import make_hello
from twotower.wire.logprobs import logprobs_from_pb
from twotower.wire.params import params_to_pb

PARAMS = GenerationParams(max_tokens=60, gamma=0.3)
LONG = GenerationParams(max_tokens=1600, gamma=0.9)
PROMPTS = [[5], [6, 7, 8], list(range(4, 90)), [9, 9], [10, 4, 3]]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def local(path: Path) -> LocalEngine:
    return LocalEngine(path, threads=1)


@pytest.fixture
async def stack(path: Path) -> AsyncIterator[Towers]:
    async with towers(path) as running:
        yield running


async def _queue_is_empty(stack: Towers) -> None:
    async with asyncio.timeout(10):
        while await stack.queue.depth():  # noqa: ASYNC110  # Redis has no event for it
            await asyncio.sleep(0.01)


async def _nothing_is_left(stack: Towers, *workers: RunningWorker) -> None:
    await until(lambda: len(stack.service.sessions) == 0 and all(w.worker.load == 0 for w in workers))
    assert all(not w.loop._residents and not w.loop._waiting for w in workers)
    await _queue_is_empty(stack)
    streams = {f"twotower:{stack.checkpoint.identity}:ready:{priority}" for priority in ("low", "normal", "high")}
    assert set(await stack.redis.keys("*")) == streams
    pools = [stack.pool, *(w.pool for w in workers)]
    await until(lambda: all(pool.used_slots == pool.used_pages == 0 for pool in pools))


@pytest.mark.parametrize("workers", [1, 3])
async def test_many_sessions_equal_one_by_one(stack: Towers, local: LocalEngine, workers: int) -> None:
    running = [stack.start_worker() for _ in range(workers)]
    requests = [
        (prompt, dataclasses.replace(PARAMS, mode=mode, temperature=temperature, seed=seed, block_size=size, steps=size))
        for seed, prompt in enumerate(PROMPTS)
        for mode, temperature, size in ((Mode.DIFFUSION, 0.0, 16), (Mode.DIFFUSION, 0.8, 8), (Mode.AR, 0.8, 16))
    ]
    results = await asyncio.gather(*(stack.generate(*request) for request in requests))
    for (prompt, params), (tokens, forwards) in zip(requests, results, strict=True):
        expected = local.generate(prompt, params)
        assert tokens == expected.token_ids
        assert forwards == expected.forwards
    await _nothing_is_left(stack, *running)


async def test_events_are_blocks_then_the_end(stack: Towers) -> None:
    stack.start_worker()
    events = [event async for event in stack.open([5, 6], PARAMS)]
    assert [len(event.block.token_ids) for event in events[:-1]] == [16, 16, 16, 12]
    assert events[-1].HasField("end")


async def test_a_worker_holds_the_same_bits_as_the_context(stack: Towers) -> None:
    """At every block's start: conv tails, S, K and V on both sides, while other sessions share the batches."""
    compared = 0
    worker = stack.start_worker()
    start = worker.loop.engine.start

    def compare_and_start(params: GenerationParams, theirs: ContextState, generated: int) -> Refinement:
        """The context waits for this block: its state is at rest."""
        nonlocal compared
        for resident in stack.loop._residents.values():
            ours, live = resident.session.state, stack.service.sessions.get(resident.name)
            if live is None or live.transcript.generated != generated or live.params.seed != params.seed:
                continue
            assert ours.length == theirs.length
            for i, mamba in ours.mamba.items():
                assert torch.equal(mamba.ssm, theirs.mamba[i].ssm)
                assert torch.equal(mamba.conv[:, 1:], theirs.mamba[i].conv[:, 1:])  # the oldest column is never read
            for i, kv in ours.kv.items():
                for a, b in zip(kv.slice(0, ours.length), theirs.kv[i].slice(0, ours.length), strict=True):
                    assert torch.equal(a, b)
            compared += 1
        return start(params, theirs, generated)

    worker.loop.engine.start = compare_and_start  # type: ignore[method-assign,assignment]
    params = [dataclasses.replace(PARAMS, max_tokens=160, seed=seed, gamma=seed / 5) for seed in range(5)]
    await asyncio.gather(*(stack.generate(prompt, p) for prompt, p in zip(PROMPTS, params, strict=True)))
    assert compared == 5 * 10


@pytest.mark.parametrize("wait_for_blocks", [0, 3])
async def test_a_worker_that_vanishes(stack: Towers, local: LocalEngine, wait_for_blocks: int) -> None:
    """Another one finishes; at most one block is refined twice, and nothing is emitted twice."""
    first = stack.start_worker()
    tokens: list[int] = []
    blocks = 0
    async for event in stack.open([5, 6, 7], LONG):
        if not event.HasField("block"):
            continue
        tokens += event.block.token_ids
        if blocks == wait_for_blocks:
            await first.die()
            second = stack.start_worker()
        blocks += 1
    assert tokens == local.generate([5, 6, 7], LONG).token_ids
    await _nothing_is_left(stack, first, second)


async def test_a_drained_worker_hands_back_at_a_block_border(stack: Towers, local: LocalEngine) -> None:
    first = stack.start_worker()
    tokens: list[int] = []
    draining: asyncio.Task[None] | None = None
    async for event in stack.open([5, 6, 7], LONG):
        tokens += event.block.token_ids
        if draining is None:
            first.tasks[1].cancel()
            draining = asyncio.create_task(first.worker.drain(10))
            second = stack.start_worker()
    assert draining is not None
    await draining
    assert tokens == local.generate([5, 6, 7], LONG).token_ids
    await _nothing_is_left(stack, first, second)


@pytest.mark.parametrize("mode", [Mode.DIFFUSION, Mode.AR])
async def test_a_client_that_leaves(stack: Towers, mode: Mode) -> None:
    worker = stack.start_worker()
    call: Any = stack.open([5, 6, 7], dataclasses.replace(LONG, mode=mode))
    async for _ in call:
        break
    call.cancel()
    await _nothing_is_left(stack, worker) if mode is Mode.DIFFUSION else await until(lambda: len(stack.service.sessions) == 0)


@pytest.mark.parametrize("mode", [Mode.DIFFUSION, Mode.AR])
async def test_a_client_that_does_not_read_holds_up_no_one(
    stack: Towers, local: LocalEngine, monkeypatch: pytest.MonkeyPatch, mode: Mode
) -> None:
    monkeypatch.setattr("twotower.context.live.MAX_UNREAD", 2)
    monkeypatch.setattr("twotower.context.live.RESUME_UNREAD", 1)
    worker = stack.start_worker(slots=1)
    params = dataclasses.replace(PARAMS, mode=mode, max_tokens=200)
    request = context_pb2.OpenRequest(
        request_id="slow", prompt=inference_pb2.TokenIds(ids=[5, 6, 7]), params=params_to_pb(params)
    )
    slow = aiter(stack.service.Open(request, None))
    tokens = list((await anext(slow)).block.token_ids)
    (live,) = stack.service.sessions
    await until(lambda: live.paused and worker.worker.load == 0)
    await asyncio.sleep(0.05)  # AR: a token may be on its way
    generated = live.transcript.generated
    other = dataclasses.replace(PARAMS, seed=1)
    assert (await stack.generate([8], other))[0] == local.generate([8], other).token_ids
    assert live.transcript.generated == generated <= 5 * params.block_size
    async for event in slow:
        tokens += event.block.token_ids
    assert tokens == local.generate([5, 6, 7], params).token_ids
    await until(lambda: len(stack.service.sessions) == 0)


async def test_a_client_that_leaves_the_queue(stack: Towers) -> None:
    call: Any = stack.open([5, 6, 7], PARAMS)
    reading = asyncio.create_task(anext(aiter(call)))
    await until(lambda: any(live.entry_id for live in stack.service.sessions))
    call.cancel()
    await asyncio.gather(reading, return_exceptions=True)
    await until(lambda: len(stack.service.sessions) == 0)
    await _queue_is_empty(stack)


async def test_a_session_that_redis_forgot_is_queued_again(stack: Towers, local: LocalEngine) -> None:
    generating = asyncio.create_task(stack.generate([5, 6, 7], PARAMS))
    await until(lambda: any(live.entry_id for live in stack.service.sessions))
    await stack.redis.flushall()
    stack.start_worker()
    tokens, _ = await asyncio.wait_for(generating, 30)
    assert tokens == local.generate([5, 6, 7], PARAMS).token_ids


async def test_ar_needs_neither_worker_nor_redis(stack: Towers, local: LocalEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(context_sessions, "BROKER_WAIT_S", 0.3)
    await stack.redis.shutdown(nosave=True)
    params = dataclasses.replace(PARAMS, mode=Mode.AR)
    assert (await stack.generate([5, 6], params))[0] == local.generate([5, 6], params).token_ids
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stack.generate([5, 6], PARAMS)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert len(stack.service.sessions) == 0


async def test_a_session_goes_on_from_what_another_replica_generated(stack: Towers, local: LocalEngine) -> None:
    stack.start_worker()
    params = dataclasses.replace(PARAMS, temperature=0.7, seed=9)
    whole = local.generate([5, 6, 7], params).token_ids
    tokens: list[int] = []
    async for event in stack.open([5, 6, 7, *whole[:32]], params, generated=32):
        tokens += event.block.token_ids
    assert tokens == whole[32:]


async def test_overload(path: Path) -> None:
    async with towers(path, max_sessions=2) as stack:
        calls: list[Any] = [stack.open([5], PARAMS) for _ in range(2)]
        await until(lambda: len(stack.service.sessions) == 2)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stack.generate([5], PARAMS)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        for call in calls:
            call.cancel()
        await until(lambda: len(stack.service.sessions) == 0)


async def test_the_most_urgent_of_those_that_wait_is_next(path: Path) -> None:
    """For state memory, and in the queue of a worker with one slot."""
    ended: list[str] = []

    async def generate(stack: Towers, name: str) -> None:
        priority = inference_pb2.Priority.Value(f"PRIORITY_{name}")
        request = context_pb2.OpenRequest(
            prompt=inference_pb2.TokenIds(ids=[5]), params=params_to_pb(PARAMS), priority=priority
        )
        _ = [event async for event in stack.stub.Open(request)]
        ended.append(name)

    async with towers(path, max_sessions=1, max_waiting=8) as stack, asyncio.TaskGroup() as group:
        for count, name in enumerate(("NORMAL", "LOW", "NORMAL", "HIGH"), 1):  # the first has the memory at once
            group.create_task(generate(stack, name))
            await until(lambda: len(stack.service.sessions) == count)  # noqa: B023
        stack.start_worker(slots=1)
    assert ended == ["NORMAL", "HIGH", "NORMAL", "LOW"]


async def test_not_a_number_reaches_the_client_and_no_one_else(stack: Towers, local: LocalEngine) -> None:
    worker = stack.start_worker()
    good = asyncio.create_task(stack.generate([6, 7], LONG))
    await until(lambda: worker.worker.load == 1)
    start = worker.loop.engine.start

    def spoil_and_start(params: GenerationParams, state: ContextState, generated: int) -> Refinement:
        if params.seed == 13 and generated >= 32:
            for mamba in state.mamba.values():
                mamba.ssm.fill_(torch.nan)
        return start(params, state, generated)

    worker.loop.engine.start = spoil_and_start  # type: ignore[method-assign,assignment]
    with pytest.raises(grpc.aio.AioRpcError, match="not finite") as caught:
        await stack.generate([5], dataclasses.replace(LONG, seed=13))
    assert caught.value.code() is grpc.StatusCode.DATA_LOSS
    assert (await good)[0] == local.generate([6, 7], LONG).token_ids
    await _nothing_is_left(stack, worker)


@pytest.mark.parametrize(
    ("prompt", "changes", "generated", "field"),
    [
        ([], {}, 0, "generated|prompt"),
        ([96], {}, 0, "prompt"),
        ([5], {"gamma": 1.5}, 0, "gamma"),
        ([5], {"block_size": 0}, 0, "block_size"),
        ([5], {"max_tokens": 5000}, 0, "max_tokens"),
        ([5], {}, 1, "generated"),
        ([5], {}, -1, "generated"),
        ([5, 6, 7], {"max_tokens": 2}, 2, "generated"),
    ],
)
async def test_what_a_gateway_should_not_have_sent(
    stack: Towers, prompt: list[int], changes: dict[str, Any], generated: int, field: str
) -> None:
    call = stack.open(prompt, dataclasses.replace(PARAMS, **changes), generated)
    with pytest.raises(grpc.aio.AioRpcError, match=field) as caught:
        _ = [event async for event in call]
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


class _Link:
    """A worker of the test's own."""

    def __init__(self, stack: Towers, name: str = "test") -> None:
        self.call: Any = stack.stub.Link()
        self.hello = make_hello(stack.checkpoint.identity, torch.float32, name)

    async def open(self, **changes: Any) -> None:
        for field, value in changes.items():
            setattr(self.hello, field, value)
        await self.send(hello=self.hello)
        assert (await self.call.read()).HasField("welcome")

    async def send(self, **message: Any) -> None:
        await self.call.write(link_pb2.WorkerMessage(**message))

    async def attach(self, live: LiveSession, lease: int | None = None) -> link_pb2.ContextMessage:
        """The answer: a state, whose frames are read, or the end."""
        ref = link_pb2.SessionRef(id=live.id, lease=live.lease if lease is None else lease)
        await self.send(attach=link_pb2.Attach(sessions=[ref]))
        while (message := await self.call.read()).HasField("frames"):
            pass
        return message  # type: ignore[no-any-return]  # gRPC's read

    async def error(self) -> grpc.aio.AioRpcError:
        """What the context ends the link with."""

        async def read_on() -> None:
            while await self.call.read() is not grpc.aio.EOF:  # type: ignore[attr-defined]  # absent from the stubs
                pass

        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await read_on()
        return caught.value


async def _waiting_session(stack: Towers) -> LiveSession:
    await until(lambda: any(live.entry_id for live in stack.service.sessions))
    (live,) = stack.service.sessions
    return live


def _ref(live: LiveSession) -> link_pb2.SessionRef:
    return link_pb2.SessionRef(id=live.id, lease=live.lease)


async def test_workers_that_do_not_fit(stack: Towers) -> None:
    call: Any = stack.open([5, 6, 7], PARAMS)
    live = await _waiting_session(stack)
    for field, value in (("checkpoint_id", "other"), ("dtype", 2), ("schema_version", 99)):
        link = _Link(stack)
        setattr(link.hello, field, value)
        await link.send(hello=link.hello)
        error = await link.error()
        assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert field in str(error.details())
    link = _Link(stack)
    await link.send(alive=link_pb2.Alive())
    assert "hello" in str((await link.error()).details())
    # and after all that, the session is still to be had
    assert live.entry_id is not None
    stack.start_worker()
    tokens = [token async for event in call for token in event.block.token_ids]
    assert len(tokens) == 60


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"token_ids": [1, 2, 3]}, "done.token_ids: 3 tokens in a block of 16"),
        ({"token_ids": [96] * 16}, "done.token_ids: a token is outside the vocabulary"),
        ({"generated": 16}, "done.generated: 16, the session has 0"),
        ({"logprobs": [inference_pb2.TokenLogprobs(logprob=-1.0)]}, "logprobs: 1, where 0 are due"),
    ],
)
async def test_blocks_that_do_not_fit_end_the_link_and_not_the_session(
    stack: Towers, local: LocalEngine, change: dict[str, Any], said: str
) -> None:
    call: Any = stack.open([5, 6, 7], PARAMS)
    live = await _waiting_session(stack)
    link = _Link(stack)
    await link.open()
    assert (await link.attach(live)).HasField("state")
    said_of_it: dict[str, Any] = {"generated": 0, "token_ids": [1] * 16, "forwards": 1} | change
    block = link_pb2.BlockDone(session=_ref(live), **said_of_it)
    await link.send(done=link_pb2.BlocksDone(blocks=[block]))
    assert said in str((await link.error()).details())
    stack.start_worker()
    tokens = [token async for event in call for token in event.block.token_ids]
    assert tokens == local.generate([5, 6, 7], PARAMS).token_ids


async def test_a_session_that_no_worker_can_take_fails(stack: Towers) -> None:
    """It is queued again after each, but not for ever."""
    call: Any = stack.open([5, 6, 7], PARAMS)
    lease = 0
    for _ in range(MAX_FAILURES):
        await until(lambda lease=lease: any(one.entry_id and one.lease > lease for one in stack.service.sessions))  # type: ignore[misc]
        (live,) = stack.service.sessions
        lease = live.lease
        link = _Link(stack)
        await link.open()
        assert (await link.attach(live)).HasField("state")
        link.call.cancel()
    with pytest.raises(grpc.aio.AioRpcError, match=f"failed {MAX_FAILURES} times") as caught:
        _ = [event async for event in call]
    assert caught.value.code() is grpc.StatusCode.INTERNAL


async def test_failures_are_counted_on_from_what_the_gateway_has_seen(stack: Towers) -> None:
    request = context_pb2.OpenRequest(
        request_id="test", prompt=inference_pb2.TokenIds(ids=[5]), params=params_to_pb(PARAMS), failures=MAX_FAILURES - 1
    )
    call: Any = stack.stub.Open(request)
    live = await _waiting_session(stack)
    link = _Link(stack)
    await link.open()
    await link.attach(live)
    link.call.cancel()
    with pytest.raises(grpc.aio.AioRpcError, match=f"failed {MAX_FAILURES} times"):
        _ = [event async for event in call]


async def test_what_comes_with_an_old_lease_is_dropped(stack: Towers, local: LocalEngine) -> None:
    """A worker that was thought dead, and is not, writes into nobody's text."""
    call: Any = stack.open([5, 6, 7], PARAMS)
    live = await _waiting_session(stack)
    stale = _ref(live)
    link = _Link(stack)
    await link.open()
    assert (await link.attach(live)).HasField("state")
    detached = link_pb2.Detached(session=stale, reason=link_pb2.DETACH_REASON_HANDED_BACK)
    await link.send(detach=link_pb2.Detach(sessions=[detached]))
    await until(lambda: live.lease > stale.lease and live.entry_id is not None)
    block = link_pb2.BlockDone(session=stale, generated=0, token_ids=[1] * 16, forwards=1)
    await link.send(done=link_pb2.BlocksDone(blocks=[block]))
    failed = link_pb2.Detached(session=stale, reason=link_pb2.DETACH_REASON_NOT_FINITE, detail="too late")
    await link.send(detach=link_pb2.Detach(sessions=[failed]))
    answer = await link.attach(live, lease=stale.lease)
    assert answer.ended.sessions[0].reason == link_pb2.END_REASON_LEASE_LOST
    stack.start_worker()
    tokens = [token async for event in call for token in event.block.token_ids]
    assert tokens == local.generate([5, 6, 7], PARAMS).token_ids


async def test_a_worker_that_is_silent_loses_its_sessions(path: Path, local: LocalEngine) -> None:
    async with towers(path, silence_s=0.5) as stack:
        call: Any = stack.open([5, 6, 7], PARAMS)
        live = await _waiting_session(stack)
        link = _Link(stack)
        await link.open()
        assert (await link.attach(live)).HasField("state")
        error = await link.error()
        assert error.code() is grpc.StatusCode.ABORTED
        assert "silent" in str(error.details())
        stack.start_worker()
        tokens = [token async for event in call for token in event.block.token_ids]
    assert tokens == local.generate([5, 6, 7], PARAMS).token_ids


async def test_a_worker_without_work_is_not_silent(path: Path, local: LocalEngine) -> None:
    async with towers(path, silence_s=0.4) as stack:
        worker = stack.start_worker()
        await stack.generate([5], PARAMS)
        (link,) = worker.worker._links.values()
        await asyncio.sleep(1.0)
        assert (await stack.generate([5, 6, 7], PARAMS))[0] == local.generate([5, 6, 7], PARAMS).token_ids
        assert list(worker.worker._links.values()) == [link]


async def test_a_forward_that_fails_on_a_worker_is_done_again(stack: Towers, local: LocalEngine) -> None:
    worker = stack.start_worker()
    step, failed = worker.loop.engine.step, 0

    def fail_once(blocks: Any) -> None:
        nonlocal failed
        failed += 1
        if failed == 3:
            raise RuntimeError("out of memory")
        step(blocks)

    worker.loop.engine.step = fail_once  # type: ignore[method-assign,assignment]
    expected = local.generate([5, 6, 7], PARAMS)
    assert (await stack.generate([5, 6, 7], PARAMS))[0] == expected.token_ids
    await _nothing_is_left(stack, worker)


@pytest.mark.parametrize("seed", [None, 2])
async def test_a_session_on_which_every_forward_fails_ends_alone(stack: Towers, local: LocalEngine, seed: int | None) -> None:
    """Its neighbours, their batches and the workers go on."""
    workers = [stack.start_worker() for _ in range(2)]
    for worker in workers:
        step = worker.loop.engine.step

        def poisoned(blocks: Sequence[Refinement], step: Any = step) -> None:
            if any(block.params.seed == seed for block in blocks):
                raise RuntimeError("device-side assert triggered")
            step(blocks)

        worker.loop.engine.step = poisoned  # type: ignore[method-assign,assignment]

    async def one(own: int) -> list[int] | str:
        try:
            return (await stack.generate([5, own], dataclasses.replace(PARAMS, seed=own)))[0]
        except grpc.aio.AioRpcError as error:
            return f"{error.code().name}: {error.details()}"

    results = await asyncio.gather(*(one(own) for own in range(6)))
    for own, result in enumerate(results):
        if own == seed:
            assert isinstance(result, str)
            assert result.startswith("INTERNAL: the request failed 4 times without a block between")
        else:
            assert result == local.generate([5, own], dataclasses.replace(PARAMS, seed=own)).token_ids
    await _nothing_is_left(stack, *workers)


async def test_a_prompt_or_a_block_that_the_context_fails_on_ends_alone(stack: Towers, local: LocalEngine) -> None:
    stack.start_worker()
    engine = stack.loop._engine
    read, commit = engine.read, engine.commit_together

    def poisoned_read(chunks: Sequence[tuple[Session, int]]) -> None:
        if any(session.params.seed == 1 for session, _ in chunks):
            raise RuntimeError("out of memory")
        read(chunks)

    def poisoned_commit(work: Sequence[tuple[Session, Sequence[int]]]) -> DeltaBatch:
        if any(session.params.seed == 2 for session, _ in work):
            raise RuntimeError("out of memory")
        return commit(work)

    engine.read, engine.commit_together = poisoned_read, poisoned_commit  # type: ignore[method-assign,assignment]

    async def one(own: int) -> list[int] | str:
        try:
            return (await stack.generate(PROMPTS[2][own:], dataclasses.replace(PARAMS, seed=own)))[0]
        except grpc.aio.AioRpcError as error:
            return f"{error.code().name}: {error.details()}"

    results = await asyncio.gather(*(one(own) for own in range(6)))
    for own, result in enumerate(results):
        if own in (1, 2):
            assert result == "UNAVAILABLE: the context tower failed on this request"  # another context may be better
        else:
            assert result == local.generate(PROMPTS[2][own:], dataclasses.replace(PARAMS, seed=own)).token_ids


async def test_an_attached_session_is_not_given_twice(stack: Towers) -> None:
    worker = stack.start_worker()
    call: Any = stack.open([5, 6, 7], LONG)
    await until(lambda: worker.worker.load == 1 and any(live.link for live in stack.service.sessions))
    (live,) = stack.service.sessions
    thief = _Link(stack, "thief")
    await thief.open()
    assert (await thief.attach(live)).ended.sessions[0].reason == link_pb2.END_REASON_LEASE_LOST
    thief.call.cancel()
    call.cancel()


@pytest.mark.parametrize("mode", [Mode.DIFFUSION, Mode.AR])
async def test_logprobs_are_those_of_one_process(stack: Towers, local: LocalEngine, mode: Mode) -> None:
    """Beside sessions that do not ask; cut with the tokens, and for no one else."""
    stack.start_worker()
    params = [
        dataclasses.replace(PARAMS, mode=mode, max_tokens=20, temperature=0.8, seed=seed, logprobs=logprobs)
        for seed, logprobs in enumerate((2, None, 0, 5))
    ]

    async def told(prompt: list[int], one: GenerationParams) -> list[TokenLogprob]:
        blocks = [event.block for event in [event async for event in stack.open(prompt, one)] if event.HasField("block")]
        assert all(len(block.logprobs) == (0 if one.logprobs is None else len(block.token_ids)) for block in blocks)
        return [entry for block in blocks for entry in logprobs_from_pb(block.logprobs)]

    results = await asyncio.gather(*(told(prompt, one) for prompt, one in zip(PROMPTS, params, strict=False)))
    for prompt, one, entries in zip(PROMPTS, params, results, strict=False):
        expected = [entry for block in local.blocks(prompt, one) for entry in block.logprobs]
        assert [entry.logprob for entry in entries] == pytest.approx([entry.logprob for entry in expected], abs=1e-4)
        assert [[i for i, _ in entry.top] for entry in entries] == [[i for i, _ in entry.top] for entry in expected]
    assert [len(entries) for entries in results] == [20, 0, 20, 20]


async def test_logprobs_that_do_not_fit_are_refused_and_the_session_goes_on(stack: Towers, local: LocalEngine) -> None:
    params = dataclasses.replace(PARAMS, logprobs=1)
    call: Any = stack.open([5, 6, 7], params)
    good = inference_pb2.TokenLogprobs(logprob=-1.0, top=[inference_pb2.TopLogprob(token_id=5, logprob=-1.0)])
    endless = inference_pb2.TokenLogprobs(logprob=-float("inf"), top=good.top)
    for logprobs, said in (([], "0, where 16 are due"), ([endless] * 16, "one is not finite")):
        live = await _waiting_session(stack)
        link = _Link(stack)
        await link.open()
        assert (await link.attach(live)).HasField("state")
        block = link_pb2.BlockDone(session=_ref(live), generated=0, token_ids=[1] * 16, forwards=1, logprobs=logprobs)
        await link.send(done=link_pb2.BlocksDone(blocks=[block]))
        error = await link.error()
        assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert f"logprobs: {said}" in str(error.details())
    stack.start_worker()
    blocks = [event.block async for event in call if event.HasField("block")]
    assert [token for block in blocks for token in block.token_ids] == local.generate([5, 6, 7], params).token_ids


@pytest.mark.parametrize("mode", [Mode.DIFFUSION, Mode.AR])
async def test_a_deadline_frees_the_slots_of_both_towers(stack: Towers, mode: Mode) -> None:
    worker = stack.start_worker()
    params = dataclasses.replace(LONG, mode=mode, max_tokens=4000, gamma=1.0)
    request = context_pb2.OpenRequest(request_id="late", prompt=inference_pb2.TokenIds(ids=[5]), params=params_to_pb(params))
    worker.slow_down()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        _ = [event async for event in stack.stub.Open(request, timeout=0.5)]
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await _nothing_is_left(stack, worker)
