"""A worker and its slots: how many sessions it takes, and how it gets rid of those it cannot serve."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from prometheus_client import CollectorRegistry

from tests.support.checkpoints import write_tiny_checkpoint
from tests.support.towers import RunningWorker, Towers, towers
from tests.support.waiting import until
from twotower.broker.ready_queue import ReadySession
from twotower.denoiser import worker as worker_module
from twotower.engine.local import LocalEngine
from twotower.internal.v1 import context_pb2_grpc, link_pb2, tensor_pb2
from twotower.request import GenerationParams
from twotower.rpc.server import RpcServer
from twotower.wire.params import params_to_pb

PARAMS = GenerationParams(max_tokens=60, gamma=0.3)
LONG = GenerationParams(max_tokens=96, gamma=0.9)


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


async def _still_works(stack: Towers, worker: RunningWorker, local: LocalEngine) -> None:
    """Nothing is left of what came before, and a session is served."""
    assert (await stack.generate([5, 6], PARAMS))[0] == local.generate([5, 6], PARAMS).token_ids
    async with asyncio.timeout(20):
        while await stack.queue.depth():  # noqa: ASYNC110  # the queue is in another process
            await asyncio.sleep(0.01)
    await until(lambda: worker.worker.load == 0)


async def test_no_more_sessions_than_slots(stack: Towers, local: LocalEngine) -> None:
    worker = stack.start_worker(slots=2)
    most = 0
    start = worker.loop.engine.start

    def watch(*args: Any) -> Any:
        nonlocal most
        most = max(most, worker.worker.load, sum(live.link is not None for live in stack.service.sessions))
        return start(*args)

    worker.loop.engine.start = watch  # type: ignore[method-assign,assignment]
    requests = [([5 + i], dataclasses.replace(LONG, seed=i)) for i in range(5)]
    results = await asyncio.gather(*(stack.generate(*request) for request in requests))
    assert [tokens for tokens, _ in results] == [local.generate(*request).token_ids for request in requests]
    assert most == 2


async def test_entries_that_lead_nowhere(stack: Towers, local: LocalEngine) -> None:
    """A session that is over, a context that is gone: taken off, and the next one is served."""
    for address in (stack.service.sessions.address, "127.0.0.1:1"):
        await stack.queue.push(ReadySession("nobody", 1, address, 64))
    worker = stack.start_worker(slots=1)
    await _still_works(stack, worker, local)


async def test_a_drain_without_sessions_is_over_at_once(stack: Towers) -> None:
    worker = stack.start_worker()
    worker.tasks[1].cancel()
    async with asyncio.timeout(5):
        await worker.worker.drain(60)


async def test_a_drain_does_not_wait_for_an_engine_that_has_ended(stack: Towers) -> None:
    """Its sessions never get to a block border; their context gives them to others."""
    worker = stack.start_worker()
    worker.slow_down()
    call: Any = stack.open([5, 6, 7], dataclasses.replace(LONG, max_tokens=2000, gamma=1.0))
    await until(lambda: bool(worker.loop._residents))
    working, pulling, *_ = worker.tasks
    pulling.cancel()

    def broken(blocks: object) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    worker.loop.engine.step = broken  # type: ignore[method-assign,assignment]
    worker.loop._isolation.blame = lambda item, error: broken(item)  # type: ignore[method-assign,assignment]  # the device is gone
    async with asyncio.timeout(10):
        await worker.worker.drain(60, working)
    assert working.done()
    call.cancel()


class WrongContext(context_pb2_grpc.ContextTowerServicer):
    """Answers every link with the same messages, then waits. `SESSION` stands for the session that is asked for."""

    def __init__(self, messages: list[link_pb2.ContextMessage]) -> None:
        self._messages = messages

    async def Link(self, requests: Any, context: Any) -> None:
        await anext(requests)
        for message in self._messages:
            await context.write(message)
        await asyncio.Event().wait()


@asynccontextmanager
async def _wrong_context(messages: list[link_pb2.ContextMessage]) -> AsyncIterator[str]:
    server = RpcServer("127.0.0.1", 0)
    context_pb2_grpc.add_ContextTowerServicer_to_server(WrongContext(messages), server.server)
    await server.start(["twotower.internal.v1.ContextTower"])
    yield server.address
    await server.stop(0)


def _frame(**fields: Any) -> link_pb2.ContextMessage:
    given: dict[str, Any] = {"name": "conv", "layer": 0, **fields}
    return link_pb2.ContextMessage(frames=tensor_pb2.FrameBatch(frames=[tensor_pb2.Frame(**given)]))


WELCOME = link_pb2.ContextMessage(welcome=link_pb2.Welcome(silence_s=5))
SESSION = link_pb2.SessionRef(id="odd", lease=1)
STATE = link_pb2.ContextMessage(state=link_pb2.State(session=SESSION, params=params_to_pb(PARAMS), length=1))


def _committed(**fields: Any) -> link_pb2.ContextMessage:
    row = link_pb2.CommittedBlock(session=SESSION, length=17, generated=16, **fields)
    return link_pb2.ContextMessage(committed=link_pb2.BlocksCommitted(rows=[row], block_size=16))


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([STATE], "expected welcome"),
        ([WELCOME, STATE, STATE], "frame 'conv' of layer 0: missing"),
        ([WELCOME, STATE, _frame(dtype=2, shape=[1])], "frame 'conv' of layer 0: dtype"),
        ([WELCOME, STATE, _frame(dtype=1, shape=[1])], "frame 'conv' of layer 0: shape"),
        ([WELCOME, STATE, _frame(name="weights")], "frame 'weights' of layer 0: not expected"),
        ([WELCOME, WELCOME], "welcome is not expected here"),
        ([WELCOME, _frame(dtype=1, shape=[1])], "frames is not expected here"),
        ([WELCOME, _committed(kept=0)], "committed.kept"),
        ([WELCOME, _committed(kept=17)], "committed.kept"),
        ([WELCOME, _committed(kept=3, draft=link_pb2.Draft(token=96, steps=1))], "draft.token"),
        ([WELCOME, _committed(kept=3, draft=link_pb2.Draft(token=5))], "draft.steps"),
        ([WELCOME, link_pb2.ContextMessage()], "an empty one is not expected here"),
    ],
)
async def test_a_context_that_speaks_nonsense(
    stack: Towers,
    local: LocalEngine,
    messages: list[link_pb2.ContextMessage],
    said: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.WARNING)
    worker = stack.start_worker(slots=1)
    async with _wrong_context(messages) as address:
        await stack.queue.push(ReadySession("odd", 1, address, 64))
        await until(lambda: any(f"context {address} is given up" in r.message and said in r.message for r in caplog.records))
        await _still_works(stack, worker, local)


async def test_links_come_and_go_with_their_contexts(stack: Towers, local: LocalEngine) -> None:
    """Nothing grows with the contexts that a worker has ever seen."""
    worker = stack.start_worker(slots=2)
    for _ in range(5):
        async with _wrong_context([WELCOME]) as address:
            await stack.queue.push(ReadySession("odd", 1, address, 64))
            await until(lambda: worker.worker.load == 1)
        await until(lambda: worker.worker.load == 0 and not worker.worker._links)
    await _still_works(stack, worker, local)
    assert list(worker.worker._links) == [stack.service.sessions.address]


async def test_a_session_that_never_fits_goes_to_a_worker_with_room(stack: Towers, local: LocalEngine) -> None:
    small = stack.start_worker(slots=1)
    small.worker._pool.ever_fits = lambda tokens: False  # type: ignore[method-assign]
    request = asyncio.ensure_future(stack.generate([5, 6], PARAMS))
    await until(lambda: [live.failures for live in stack.service.sessions] == [1])  # it was said at once
    large = stack.start_worker(slots=1)
    assert (await request)[0] == local.generate([5, 6], PARAMS).token_ids
    assert small.worker.load == 0
    await until(lambda: large.worker.load == 0)


async def test_a_drain_that_is_called_off(stack: Towers, local: LocalEngine) -> None:
    """Sessions are handed back at a block border, nothing new is taken, and once the drain is called off all go on."""
    worker = stack.start_worker(slots=2)
    worker.slow_down()
    session = asyncio.create_task(stack.generate([5, 6], LONG))
    await until(lambda: worker.worker.load == 1)
    worker.worker.begin_drain()
    await until(lambda: worker.worker.load == 0)
    waiting = asyncio.create_task(stack.generate([7, 8], PARAMS))
    await until(lambda: sum(live.entry_id is not None for live in stack.service.sessions) == 2)
    await asyncio.sleep(2 * worker_module.PULL_WAIT_S)  # a pull that was under way has come back
    assert (worker.worker.load, session.done(), waiting.done()) == (0, False, False)
    worker.worker.call_off()
    assert (await session)[0] == local.generate([5, 6], LONG).token_ids
    assert (await waiting)[0] == local.generate([7, 8], PARAMS).token_ids
    assert _value(worker.worker.metrics.registry, "twotower_denoiser_sessions_left_total", why="handed_back") >= 1
    assert _value(stack.service.sessions.metrics.registry, "twotower_context_requeues_total", why="handed_back") >= 1


async def test_what_both_towers_count(stack: Towers) -> None:
    worker = stack.start_worker()
    tokens, forwards = await stack.generate([5, 6, 7], PARAMS)
    await until(lambda: worker.worker.load == 0 and not len(stack.service.sessions))
    ours, theirs = worker.worker.metrics, stack.service.sessions.metrics
    blocks = -(-len(tokens) // PARAMS.block_size)
    for registry, name, value in (
        (ours.registry, "twotower_denoiser_generation_tokens_total", blocks * PARAMS.block_size),
        (ours.registry, "twotower_denoiser_forwards_per_block_sum", forwards),
        (ours.registry, "twotower_denoiser_forwards_per_block_count", blocks),
        (ours.registry, "twotower_denoiser_step_seconds_count", blocks),
        (ours.registry, "twotower_denoiser_commit_wait_seconds_count", blocks - 1),
        (theirs.registry, "twotower_context_prompt_tokens_total", 3),
        (theirs.registry, "twotower_context_request_prefill_time_seconds_count", 1),
        (theirs.registry, "twotower_context_request_queue_time_seconds_count", 1),
        (theirs.registry, "twotower_context_commit_seconds_count", blocks - 1),
        (theirs.registry, "twotower_context_commit_batch_size_sum", blocks - 1),
    ):
        assert _value(registry, name) == value, name
    assert _value(theirs.registry, "twotower_context_generation_tokens_total", mode="diffusion") == blocks * PARAMS.block_size
    assert _value(ours.registry, "twotower_denoiser_sessions_left_total", why="ended") == 1
    for what in ("state", "commit"):
        sent = _value(theirs.registry, "twotower_context_sent_bytes_total", transport="shm", what=what)
        received = _value(ours.registry, "twotower_denoiser_received_bytes_total", transport="shm", what=what)
        assert sent == received > 0
    assert ours.tokens_per_forward == pytest.approx(blocks * PARAMS.block_size / forwards, rel=0.01)
    assert min(ours.refine_s.value, ours.commit_s.value, ours.leaving_per_s, theirs.leaving_per_s) > 0


async def test_logits_that_are_not_finite_are_a_sign_of_sickness(stack: Towers) -> None:
    worker = stack.start_worker()
    head = worker.loop.engine.tower.lm_head
    head.weight.data = torch.full_like(head.weight, float("nan"))
    with pytest.raises(grpc.aio.AioRpcError):
        await stack.generate([5, 6, 7], PARAMS)
    assert worker.worker.metrics.sick == "not_finite"
    assert _value(worker.worker.metrics.registry, "twotower_denoiser_sessions_left_total", why="not_finite") == 1
    assert (
        _value(stack.service.sessions.metrics.registry, "twotower_context_sessions_failed_total", error="NonFiniteLogits") == 1
    )


def _value(registry: CollectorRegistry, name: str, **labels: str) -> float:
    return registry.get_sample_value(name, labels) or 0.0
