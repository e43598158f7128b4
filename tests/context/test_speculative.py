"""Speculative mode in context and workers together: AR's text, whatever drafts, and whoever lives."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
from collections.abc import AsyncIterator, Iterable
from pathlib import Path

import grpc
import pytest
import torch

from tests.support.checkpoints import write_tiny_checkpoint
from tests.support.loops import FixedTimes
from tests.support.towers import RunningWorker, Towers, towers
from tests.support.waiting import until
from twotower.engine.local import LocalEngine
from twotower.engine.refinement import Refinement
from twotower.internal.v1 import context_pb2
from twotower.model.state import ContextState
from twotower.request import GenerationParams, Mode

DRAFTS = GenerationParams(mode=Mode.SPECULATIVE, max_tokens=48, steps=1)
DRAWN = {"temperature": 0.8, "seed": 7}
PROMPTS = [[5], [6, 7, 8], list(range(4, 60)), [9, 9]]


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


def _ar(local: LocalEngine, prompt: list[int], params: GenerationParams) -> list[int]:
    mode = Mode.AR if params.mode is Mode.SPECULATIVE else params.mode
    return local.generate(prompt, dataclasses.replace(params, mode=mode, steps=max(params.steps, 1))).token_ids


def _kept(event: context_pb2.SessionEvent) -> int | None:
    """Tokens that a round kept; None: no round."""
    return len(event.block.token_ids) if event.block.draft.drafted else None


def _know(worker: RunningWorker, texts: dict[int, list[int]]) -> None:
    """Let a worker draft AR's texts, by seed, each draft with a mistake somewhere."""
    step, drafted = worker.loop.engine.step, 0

    def know(blocks: Iterable[Refinement]) -> None:
        nonlocal drafted
        blocks = list(blocks)
        step(blocks)
        for block in blocks:
            if block.draft and block.done and (text := texts.get(block.params.seed)) is not None:
                drafted += 1
                draft = [*text[block.generated - 1 :], *[0] * 16][:16]
                wrong = 1 + drafted * 7 % 15
                draft[wrong] = (draft[wrong] + 1) % 90
                block.tokens = torch.tensor(draft)

    worker.loop.engine.step = know  # type: ignore[method-assign]


@pytest.mark.parametrize("workers", [1, 3])
async def test_texts_are_ars_among_others_of_all_modes(stack: Towers, local: LocalEngine, workers: int) -> None:
    for _ in range(workers):
        stack.start_worker()
    changes = [{"steps": 1}, {"steps": 0, **DRAWN}, {"steps": 3, "block_size": 5, **DRAWN, "top_p": 0.8}]
    requests = [(prompt, dataclasses.replace(DRAFTS, **change)) for prompt in PROMPTS for change in changes]  # type: ignore[arg-type]
    requests += [(prompt, GenerationParams(max_tokens=48, gamma=0.3)) for prompt in PROMPTS]
    requests += [(prompt, GenerationParams(mode=Mode.AR, max_tokens=48)) for prompt in PROMPTS]
    results = await asyncio.gather(*(stack.generate(*request) for request in requests))
    for (prompt, params), (tokens, _) in zip(requests, results, strict=True):
        assert tokens == _ar(local, prompt, params)
    await until(lambda: len(stack.service.sessions) == 0 and stack.pool.used_slots == 0)


async def test_after_every_partial_commit_a_worker_holds_the_bits_of_the_context(stack: Towers, local: LocalEngine) -> None:
    worker = stack.start_worker()
    params = [dataclasses.replace(DRAFTS, seed=seed, temperature=0.8 * (seed % 2)) for seed in range(4)]
    texts = [_ar(local, prompt, one) for prompt, one in zip(PROMPTS, params, strict=True)]
    _know(worker, dict(enumerate(texts)))
    start, compared = worker.loop.engine.start, 0

    def compare_and_start(
        params: GenerationParams, theirs: ContextState, generated: int, known: int | None = None, steps: int | None = None
    ) -> Refinement:
        """The context waits for this draft: its state is at rest."""
        nonlocal compared
        for resident in stack.loop._residents.values():
            session, ours = resident.session, resident.session.state
            if session.params.seed != params.seed or session.generated != generated:
                continue
            assert (known, ours.length) == (session.pending, theirs.length)
            for i, mamba in ours.mamba.items():
                assert torch.equal(mamba.ssm, theirs.mamba[i].ssm)
                assert torch.equal(mamba.conv[:, 1:], theirs.mamba[i].conv[:, 1:])  # the oldest column is never read
            for i, kv in ours.kv.items():
                for a, b in zip(kv.slice(0, ours.length), theirs.kv[i].slice(0, ours.length), strict=True):
                    assert torch.equal(a, b)
            compared += 1
        return start(params, theirs, generated, known, steps)

    worker.loop.engine.start = compare_and_start  # type: ignore[method-assign,assignment]
    other = asyncio.create_task(stack.generate([5, 6], GenerationParams(max_tokens=160, gamma=0.9, seed=100)))
    results = await asyncio.gather(*(stack.generate(p, one) for p, one in zip(PROMPTS, params, strict=True)))
    assert [tokens for tokens, _ in results] == texts
    await other
    assert compared > 3 * len(PROMPTS)


@pytest.mark.parametrize("changes", [{}, DRAWN])
async def test_workers_that_vanish(stack: Towers, local: LocalEngine, changes: dict[str, float]) -> None:
    params = dataclasses.replace(DRAFTS, max_tokens=900, **changes)  # type: ignore[arg-type]
    text = _ar(local, [5, 6, 7], params)
    worker = stack.start_worker()
    _know(worker, {params.seed: text})
    tokens: list[int] = []
    rounds = 0
    async for event in stack.open([5, 6, 7], params):
        tokens += event.block.token_ids
        rounds += _kept(event) is not None
        if rounds == 2 and len(stack.workers) < 3:
            rounds = 0
            await worker.die()
            worker = stack.start_worker()
            _know(worker, {params.seed: text})
    assert len(stack.workers) >= 2
    assert tokens == text


async def test_without_a_worker_the_context_writes_alone(stack: Towers, local: LocalEngine) -> None:
    events = [event async for event in stack.open([6, 7], DRAFTS)]
    assert [token for event in events for token in event.block.token_ids] == _ar(local, [6, 7], DRAFTS)
    assert all(_kept(event) is None for event in events)
    assert sum(event.block.draft.context_forwards for event in events) == DRAFTS.max_tokens - 1


async def test_a_session_goes_on_from_what_another_replica_generated(stack: Towers, local: LocalEngine) -> None:
    stack.start_worker()
    params = dataclasses.replace(DRAFTS, **DRAWN)  # type: ignore[arg-type]
    text = _ar(local, [5, 6, 7], params)
    for rounds in ([], [3, 0, 0, 16, 1]):
        done = 1 + sum(max(kept, 1) for kept in rounds)
        events = stack.open([5, 6, 7, *text[:done]], params, done, rounds)
        assert [token async for event in events for token in event.block.token_ids] == text[done:]


@pytest.mark.parametrize(("mode", "rounds"), [(Mode.SPECULATIVE, [1]), (Mode.SPECULATIVE, [17]), (Mode.AR, [2, 1])])
async def test_rounds_that_cannot_be(stack: Towers, mode: Mode, rounds: list[int]) -> None:
    with pytest.raises(grpc.aio.AioRpcError, match="rounds") as caught:
        _ = [event async for event in stack.open([5, *range(4, 22)], dataclasses.replace(DRAFTS, mode=mode), 18, rounds)]
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_denoiser_that_is_not_finite_costs_drafts_and_no_text(stack: Towers, local: LocalEngine) -> None:
    worker = stack.start_worker()
    with torch.no_grad():
        worker.loop.engine.tower.lm_head.weight.fill_(torch.nan)
    events = [event async for event in stack.open([6, 7], dataclasses.replace(DRAFTS, max_tokens=200))]
    assert [token for event in events for token in event.block.token_ids] == _ar(
        local, [6, 7], dataclasses.replace(DRAFTS, max_tokens=200)
    )
    assert all(_kept(event) is None for event in events)


async def test_a_session_rests_from_drafts_that_earn_little_and_comes_back(stack: Towers, local: LocalEngine) -> None:
    """The worker lets go of it: its slot is free meanwhile."""
    stack.start_worker(slots=1)
    await stack.generate([5], GenerationParams(max_tokens=4))  # the link takes a while, in which AR writes much
    params = dataclasses.replace(DRAFTS, steps=0, max_tokens=600)
    stack.loop.times = FixedTimes(token=1.0, commit=2.0, step=4.0)
    kept = []
    tokens: list[int] = []
    async for event in stack.open([5, 6, 7], params):
        tokens += event.block.token_ids
        if event.HasField("block"):
            kept.append(_kept(event))
    assert tokens == _ar(local, [5, 6, 7], params)
    rounds = [i for i, one in enumerate(kept) if one is not None]
    assert rounds
    assert any(later - earlier > 60 for earlier, later in itertools.pairwise(rounds))


async def test_a_step_that_is_shown_is_of_what_comes_next_and_nothing_of_it_is_final(stack: Towers, local: LocalEngine) -> None:
    stack.start_worker()
    params = dataclasses.replace(DRAFTS, show_steps=True, steps=2)
    text: list[int] = []
    steps = 0
    async for event in stack.open([5, 6], params):
        text += event.block.token_ids
        if event.HasField("step"):
            steps += 1
            assert len(event.step.token_ids) == len(event.step.confidence) == params.block_size - 1
            assert list(event.step.committed) == [False] * (params.block_size - 1)
    assert steps
    assert text == _ar(local, [5, 6], params)
