"""The denoiser's loop alone: blocks join, leave and fail between forwards."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from tests.support.checkpoints import write_tiny_checkpoint
from tests.support.waiting import until
from twotower.denoiser.loop import MAX_FAILURES, DenoiserLoop
from twotower.engine.denoiser_engine import DenoiserEngine
from twotower.engine.local import LocalEngine
from twotower.engine.refinement import Refinement
from twotower.engine.thread import EngineThread
from twotower.errors import TwoTowerError
from twotower.request import GenerationParams

PARAMS = [
    GenerationParams(gamma=0.1),
    GenerationParams(gamma=1.0, steps=3),
    GenerationParams(gamma=0.3, temperature=0.9, seed=5),
    GenerationParams(block_size=8, steps=8, gamma=0.5),
]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> LocalEngine:
    return LocalEngine(write_tiny_checkpoint(tmp_path_factory.mktemp("tiny")), threads=1)


@pytest.fixture
async def loop(engine: LocalEngine) -> AsyncIterator[DenoiserLoop]:
    loop = DenoiserLoop(engine.denoiser, EngineThread("test"))
    running = asyncio.create_task(loop.run())
    yield loop
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


def _start(engine: LocalEngine, params: GenerationParams, prompt: tuple[int, ...] = (5, 6, 7)) -> Refinement:
    session = engine.context.open("test", list(prompt), params)
    engine.context.prefill(session, len(prompt))
    return engine.denoiser.start(params, session.state, 0)


def _alone(engine: LocalEngine, params: GenerationParams) -> Refinement:
    block = _start(engine, params)
    while not block.done:
        engine.denoiser.step([block])
    return block


async def test_blocks_side_by_side_equal_blocks_alone(engine: LocalEngine, loop: DenoiserLoop) -> None:
    alone = [_alone(engine, params) for params in PARAMS]
    together = [_start(engine, params) for params in PARAMS]
    await asyncio.gather(*(loop.refine(block) for block in together))
    assert [block.tokens.tolist() for block in together] == [block.tokens.tolist() for block in alone]
    assert [block.forwards for block in together] == [block.forwards for block in alone]


async def test_blocks_that_one_forward_finished_know_of_one_another(engine: LocalEngine, loop: DenoiserLoop) -> None:
    params = [GenerationParams(gamma=1.0, steps=3)] * 3 + [GenerationParams(gamma=1.0, steps=5)]
    *three, one = await asyncio.gather(*(loop.refine(_start(engine, each)) for each in params))
    assert len(set(three)) == 1
    assert three[0].together == 3
    assert one.together == 1
    assert one.forward > three[0].forward


async def test_blocks_are_counted_by_context(engine: LocalEngine, loop: DenoiserLoop) -> None:
    """Each context waits for its own."""
    contexts, params = ["a:1", "b:1", "a:1"], GenerationParams(gamma=1.0, steps=3)
    finishes = await asyncio.gather(*(loop.refine(_start(engine, params), context) for context in contexts))
    assert [finish.together for finish in finishes] == [2, 1, 2]


async def test_a_cancelled_block_gets_no_further_forward(engine: LocalEngine, loop: DenoiserLoop) -> None:
    endless = GenerationParams(gamma=1.0, block_size=256, steps=256)
    block = _start(engine, endless)
    refining = asyncio.create_task(loop.refine(block))
    await until(lambda: block.forwards >= 2)
    refining.cancel()
    await asyncio.gather(refining, return_exceptions=True)
    await loop.settle()  # behind the forward that may be under way
    came_to = block.forwards
    await loop.refine(_start(engine, PARAMS[0]))
    assert block.forwards == came_to < 256


async def test_what_runs_between_forwards_has_the_engine_to_itself(engine: LocalEngine, loop: DenoiserLoop) -> None:
    inside = 0
    most = 0
    step = engine.denoiser.step

    def enter() -> None:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)

    def leave() -> None:
        nonlocal inside
        inside -= 1

    def counted(blocks: list[Refinement]) -> None:
        enter()
        step(blocks)
        leave()

    def work() -> None:
        enter()
        leave()

    loop.engine.step = counted  # type: ignore[method-assign,assignment]
    try:
        blocks = [_start(engine, params) for params in PARAMS]
        await asyncio.gather(*(loop.refine(block) for block in blocks), *(loop._thread.run(work) for _ in range(20)))
    finally:
        loop.engine.step = step  # type: ignore[method-assign]
    assert most == 1


async def test_a_forward_that_fails_ends_its_blocks_and_not_the_loop(engine: LocalEngine, loop: DenoiserLoop) -> None:
    step = engine.denoiser.step

    def fail(blocks: list[Refinement]) -> None:
        raise RuntimeError("out of memory")

    loop.engine.step = fail  # type: ignore[method-assign,assignment]
    try:
        results = await asyncio.gather(*(loop.refine(_start(engine, params)) for params in PARAMS[:2]), return_exceptions=True)
    finally:
        loop.engine.step = step  # type: ignore[method-assign]
    assert [str(result) for result in results] == ["the denoiser failed on this request"] * 2
    assert all(isinstance(result, TwoTowerError) for result in results)
    block = _start(engine, PARAMS[0])
    await loop.refine(block)
    assert block.done


async def test_a_device_that_fails_again_and_again_ends_the_loop(engine: LocalEngine) -> None:
    loop = DenoiserLoop(DenoiserEngine(engine.denoiser.tower), EngineThread("test"))

    def fail(blocks: list[Refinement]) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    loop.engine.step = fail  # type: ignore[method-assign,assignment]
    running = asyncio.create_task(loop.run())
    for _ in range(MAX_FAILURES):
        with pytest.raises(TwoTowerError):
            await loop.refine(_start(engine, PARAMS[0]))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        await asyncio.wait_for(running, 10)
