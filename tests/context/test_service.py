"""Context and workers together: what is generated, and what remains, when all goes well and when it does not."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch

from tests.support.checkpoints import write_tiny_checkpoint
from tests.support.towers import RunningWorker, Towers, towers
from tests.support.waiting import until
from twotower.context.service import MAX_QUEUED
from twotower.engine.local import LocalEngine
from twotower.engine.refinement import Refinement
from twotower.model.state import ContextState
from twotower.request import GenerationParams, Mode, TokenLogprob
from twotower.internal.v1 import context_pb2
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
    assert all(not w.loop._blocks for w in workers)
    await _queue_is_empty(stack)
    streams = {f"twotower:{stack.checkpoint.identity}:ready:{priority}" for priority in ("low", "normal", "high")}
    assert set(await stack.redis.keys("*")) == streams
    pools = [stack.service._admission.pool, *(w.worker._admission.pool for w in workers)]
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
        for live in stack.service.sessions:
            ours = live.session.state
            if live.session.generated != generated or live.session.params.seed != params.seed:
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

    worker.loop.engine.start = compare_and_start  # type: ignore[method-assign]
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
    monkeypatch.setattr("twotower.context.sessions.MAX_UNREAD", 2)
    worker = stack.start_worker(slots=1)
    params = dataclasses.replace(PARAMS, mode=mode, max_tokens=200)
    request = context_pb2.OpenRequest(request_id="slow", prompt={"ids": [5, 6, 7]}, params=params_to_pb(params))
    slow = aiter(stack.service.Open(request, None))
    tokens = list((await anext(slow)).block.token_ids)
    (live,) = stack.service.sessions
    await until(lambda: not live.read.is_set() and worker.worker.load == 0)
    generated = live.session.generated
    other = dataclasses.replace(PARAMS, seed=1)
    assert (await stack.generate([8], other))[0] == local.generate([8], other).token_ids
    assert live.session.generated == generated <= 5 * params.block_size
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


async def test_ar_needs_neither_worker_nor_redis(stack: Towers, local: LocalEngine) -> None:
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
    tokens = []
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
        request = context_pb2.OpenRequest(prompt={"ids": [5]}, params=params_to_pb(PARAMS), priority=priority)
        _ = [event async for event in stack.stub.Open(request)]
        ended.append(name)

    async with towers(path, max_sessions=1, max_waiting=8) as stack, asyncio.TaskGroup() as group:
        for count, name in enumerate(("NORMAL", "LOW", "NORMAL", "HIGH"), 1):  # the first has the memory at once
            group.create_task(generate(stack, name))
            await until(lambda: len(stack.service.sessions) + stack.service._admission.waiting == count)  # noqa: B023
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

    worker.loop.engine.start = spoil_and_start  # type: ignore[method-assign]
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


async def _attach(stack: Towers, *messages: context_pb2.WorkerMessage) -> grpc.aio.AioRpcError:
    call: Any = stack.stub.Attach(iter(messages))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        _ = [message async for message in call]
    return caught.value


async def test_workers_that_do_not_fit(stack: Towers) -> None:
    call: Any = stack.open([5, 6, 7], PARAMS)
    await until(lambda: any(live.entry_id for live in stack.service.sessions))
    (live,) = stack.service.sessions
    good = make_hello(stack.checkpoint.identity, torch.float32, "w", live.session.id, live.lease)
    code = grpc.StatusCode
    for change, expected, said in (
        ({"checkpoint_id": "other"}, code.FAILED_PRECONDITION, "checkpoint_id"),
        ({"dtype": 2}, code.FAILED_PRECONDITION, "dtype"),
        ({"schema_version": 99}, code.FAILED_PRECONDITION, "schema_version"),
        ({"session_id": "nobody"}, code.NOT_FOUND, "nobody"),
        ({"lease": live.lease - 1}, code.ABORTED, "lease"),
    ):
        hello = context_pb2.Hello()
        hello.CopyFrom(good)
        for name, value in change.items():
            setattr(hello, name, value)
        error = await _attach(stack, context_pb2.WorkerMessage(hello=hello))
        assert error.code() is expected
        assert said in str(error.details())
    error = await _attach(stack, context_pb2.WorkerMessage(failed=context_pb2.Failed(reason="x")))
    assert "hello" in str(error.details())
    done = context_pb2.BlockDone(generated=0, token_ids=[1, 2, 3], forwards=1)
    error = await _attach(stack, context_pb2.WorkerMessage(hello=good), context_pb2.WorkerMessage(block_done=done))
    assert "token_ids: 3 tokens in a block of 16" in str(error.details())
    # and after all that, the session is still to be had
    stack.start_worker()
    tokens = [token async for event in call for token in event.block.token_ids]
    assert len(tokens) == 60


async def test_a_session_that_no_worker_can_take_fails(stack: Towers) -> None:
    """It is queued again after each, but not for ever."""
    call: Any = stack.open([5, 6, 7], PARAMS)
    for lease in range(1, MAX_QUEUED + 1):
        await until(lambda lease=lease: any(one.entry_id and one.lease == lease for one in stack.service.sessions))
        (live,) = stack.service.sessions
        hello = make_hello(stack.checkpoint.identity, torch.float32, "w", live.session.id, lease)
        attached: Any = stack.stub.Attach(iter([context_pb2.WorkerMessage(hello=hello)]))
        assert (await attached.read()).HasField("attached")
        attached.cancel()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        _ = [event async for event in call]
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert f"queued {MAX_QUEUED} times" in str(caught.value.details())


async def test_a_forward_that_fails_on_a_worker_is_done_again(stack: Towers, local: LocalEngine) -> None:
    worker = stack.start_worker()
    step, failed = worker.loop.engine.step, 0

    def fail_once(blocks: Any) -> None:
        nonlocal failed
        failed += 1
        if failed == 3:
            raise RuntimeError("out of memory")
        step(blocks)

    worker.loop.engine.step = fail_once  # type: ignore[method-assign]
    expected = local.generate([5, 6, 7], PARAMS)
    assert (await stack.generate([5, 6, 7], PARAMS))[0] == expected.token_ids
    await _nothing_is_left(stack, worker)


async def test_an_attached_session_is_not_given_twice(stack: Towers) -> None:
    worker = stack.start_worker()
    call: Any = stack.open([5, 6, 7], LONG)
    await until(lambda: worker.worker.load == 1 and any(live.worker_id for live in stack.service.sessions))
    (live,) = stack.service.sessions
    hello = make_hello(stack.checkpoint.identity, torch.float32, "thief", live.session.id, live.lease)
    error = await _attach(stack, context_pb2.WorkerMessage(hello=hello))
    assert error.code() is grpc.StatusCode.ABORTED
    assert "held by worker-0" in str(error.details())
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
    await until(lambda: any(live.entry_id for live in stack.service.sessions))
    (live,) = stack.service.sessions
    good = inference_pb2.TokenLogprobs(logprob=-1.0, top=[inference_pb2.TopLogprob(token_id=5, logprob=-1.0)])
    endless = inference_pb2.TokenLogprobs(logprob=-float("inf"), top=good.top)
    for logprobs, said in (([], "0, where 16 are due"), ([endless] * 16, "one is not finite")):
        hello = make_hello(stack.checkpoint.identity, torch.float32, "w", live.session.id, live.lease)
        done = context_pb2.BlockDone(generated=0, token_ids=[1] * 16, forwards=1, logprobs=logprobs)
        error = await _attach(stack, context_pb2.WorkerMessage(hello=hello), context_pb2.WorkerMessage(block_done=done))
        assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert f"block_done.logprobs: {said}" in str(error.details())
        await until(lambda: live.entry_id is not None)
    stack.start_worker()
    blocks = [event.block async for event in call if event.HasField("block")]
    assert [token for block in blocks for token in block.token_ids] == local.generate([5, 6, 7], params).token_ids


@pytest.mark.parametrize("mode", [Mode.DIFFUSION, Mode.AR])
async def test_a_deadline_frees_the_slots_of_both_towers(stack: Towers, mode: Mode) -> None:
    worker = stack.start_worker()
    params = dataclasses.replace(LONG, mode=mode, max_tokens=4000, gamma=1.0)
    request = context_pb2.OpenRequest(request_id="late", prompt={"ids": [5]}, params=params_to_pb(params))
    worker.slow_down()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        _ = [event async for event in stack.stub.Open(request, timeout=0.5)]
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await _nothing_is_left(stack, worker)
