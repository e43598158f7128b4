"""The context's loop alone: whose commits share a forward."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from tests.support.checkpoints import write_tiny_checkpoint
from twotower.context.loop import Commit, ContextLoop, Finish
from twotower.engine.local import LocalEngine
from twotower.engine.session import Session
from twotower.engine.thread import EngineThread
from twotower.engine.turns import Turns
from twotower.model.state import Delta
from twotower.request import GenerationParams

BLOCK = list(range(5, 21))


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> LocalEngine:
    return LocalEngine(write_tiny_checkpoint(tmp_path_factory.mktemp("tiny")), threads=1)


class _Loop:
    def __init__(self, engine: LocalEngine, turns: Turns | None = None) -> None:
        self.engine = engine
        self.loop = ContextLoop(engine.context, EngineThread("test"), chunk=32, budget=64, turns=turns)
        self.running = asyncio.create_task(self.loop.run())

    def commit(self, finish: Finish) -> asyncio.Task[Commit]:
        session = self.engine.context.open("test", [5, 6, 7], GenerationParams())
        self.engine.context.prefill(session, 3)
        return asyncio.create_task(self.loop.commit(session, BLOCK, finish))

    async def stop(self) -> None:
        self.running.cancel()
        await asyncio.gather(self.running, return_exceptions=True)


@pytest.fixture
async def alone(engine: LocalEngine) -> AsyncIterator[_Loop]:
    loop = _Loop(engine)
    yield loop
    await loop.stop()


@pytest.fixture
async def shared(engine: LocalEngine, tmp_path: Path) -> AsyncIterator[_Loop]:
    """On cores that denoisers use, too."""
    (tmp_path / "turns").touch()
    turns = Turns(tmp_path / "turns")
    loop = _Loop(engine, turns)
    yield loop
    await loop.stop()
    turns.close()


async def test_blocks_of_one_forward_are_committed_together(alone: _Loop) -> None:
    first = alone.commit(Finish("a", 7, 3))
    await asyncio.sleep(0.002)
    assert not first.done()
    second, other = alone.commit(Finish("a", 7, 3)), alone.commit(Finish("b", 7, 1))
    alone.loop.arrived(Finish("a", 7, 3))  # the third block is its session's last
    results = [await asyncio.wait_for(task, 30) for task in (first, second, other)]
    assert len({result.number for result in results}) == 1
    assert [result.together for result in results] == [2, 2, 1]


async def test_a_worker_that_died_between_two_blocks_is_not_waited_for(alone: _Loop) -> None:
    result = await asyncio.wait_for(alone.commit(Finish("a", 1, 2)), 30)
    assert result.together == 1


async def test_on_shared_cores_a_few_blocks_wait_for_more(shared: _Loop) -> None:
    async with AsyncExitStack() as stack:
        refining = [stack.enter_context(shared.loop.refining()) for _ in range(3)]
        assert len(refining) == 3
        first = shared.commit(Finish("a", 1, 1))
        await asyncio.sleep(0.05)
        assert not first.done()
        second = shared.commit(Finish("a", 2, 1))
        results = [await asyncio.wait_for(task, 30) for task in (first, second)]
    assert results[0].number == results[1].number


async def test_on_cores_of_its_own_nothing_waits(alone: _Loop) -> None:
    with alone.loop.refining(), alone.loop.refining(), alone.loop.refining():
        await asyncio.wait_for(alone.commit(Finish("a", 1, 1)), 30)


async def test_a_block_waits_for_others_within_bounds(shared: _Loop) -> None:
    """Denoisers that never finish hold up nobody for ever."""
    with shared.loop.refining(), shared.loop.refining(), shared.loop.refining():
        await asyncio.wait_for(shared.commit(Finish("a", 1, 1)), 30)


async def test_prompts_are_not_held_up_by_blocks_that_wait(shared: _Loop) -> None:
    session: Session = shared.engine.context.open("test", [5] * 100, GenerationParams())
    with shared.loop.refining(), shared.loop.refining(), shared.loop.refining():
        waiting = shared.commit(Finish("a", 1, 1))
        await asyncio.wait_for(shared.loop.prefill(session), 30)
        await asyncio.wait_for(waiting, 30)
    assert session.prefill_left == 0


async def test_work_planned_for_a_session_that_leaves_is_not_run(alone: _Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its slot may be another session's by then: what it reads would become part of that one's state."""
    engine = alone.engine.context
    began, go = threading.Event(), threading.Event()
    read: list[str] = []
    prefill, commit = engine.prefill, engine.commit

    def slow_commit(work: Sequence[tuple[Session, list[int]]]) -> list[Delta]:
        began.set()
        assert go.wait(30)
        return commit(work)

    def noted_prefill(session: Session, budget: int) -> int:
        read.append(session.id)
        return prefill(session, budget)

    committing = alone.commit(Finish("a", 1, 1))
    monkeypatch.setattr(engine, "commit", slow_commit)
    monkeypatch.setattr(engine, "prefill", noted_prefill)
    leaving, staying = (engine.open(name, [5] * 20, GenerationParams()) for name in ("leaves", "stays"))
    leaves, stays = (asyncio.create_task(alone.loop.prefill(session)) for session in (leaving, staying))
    while not began.is_set():
        await asyncio.sleep(0.001)
    leaves.cancel()
    await asyncio.gather(leaves, return_exceptions=True)
    go.set()
    await asyncio.wait_for(asyncio.gather(committing, stays), 30)
    assert set(read) == {"stays"}
    assert leaving.state.length == 0
