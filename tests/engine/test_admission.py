from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch
from twotower.engine.admission import Admission

from tests.support.checkpoints import write_tiny_checkpoint
from twotower.errors import InvalidArgument, Overloaded
from twotower.model.checkpoint import Checkpoint
from twotower.model.pool import PAGE, PoolSize, StatePool
from twotower.model.state import ContextState
from twotower.request import Priority


@pytest.fixture
def admission(tmp_path: Path) -> Admission:
    config = Checkpoint.open(write_tiny_checkpoint(tmp_path)).config
    return Admission(StatePool(config, torch.float32, torch.device("cpu"), PoolSize(2, 6)), max_waiting=3)


async def _wait(admission: Admission, *requests: tuple[int, Priority]) -> list[asyncio.Task[ContextState]]:
    tasks = [asyncio.create_task(admission.acquire(tokens, priority)) for tokens, priority in requests]
    await asyncio.sleep(0)
    return tasks


async def test_first_come_first_served_within_a_priority(admission: Admission) -> None:
    held = [await admission.acquire(1), await admission.acquire(1)]
    low, normal, high = await _wait(admission, (1, Priority.LOW), (1, Priority.NORMAL), (1, Priority.HIGH))
    assert admission.waiting == 3
    for state, expected in zip(held, (high, normal), strict=True):
        admission.release(state)
        await asyncio.wait((high, normal, low), return_when=asyncio.FIRST_COMPLETED)
        assert expected.done()
    assert not low.done()
    admission.release(await high)
    admission.release(await normal)
    admission.release(await low)
    assert admission.pool.used_slots == admission.pool.used_pages == 0


async def test_a_small_one_does_not_overtake_a_large_one(admission: Admission) -> None:
    held = await admission.acquire(4 * PAGE)
    large, small = await _wait(admission, (5 * PAGE, Priority.NORMAL), (1, Priority.NORMAL))
    assert not small.done()
    admission.release(held)
    await large
    await small


async def test_a_full_queue_refuses(admission: Admission) -> None:
    held = [await admission.acquire(1), await admission.acquire(1)]
    waiting = await _wait(admission, *[(1, Priority.NORMAL)] * 3)
    with pytest.raises(Overloaded, match="3 sessions wait"):
        await admission.acquire(1, Priority.HIGH)
    for state in held:
        admission.release(state)
    for task in waiting[:2]:
        admission.release(await task)
    await waiting[2]


async def test_what_can_never_fit_is_the_requests_fault(admission: Admission) -> None:
    with pytest.raises(InvalidArgument, match=r"^max_tokens: .* 385 tokens .* of 384 in all"):
        await admission.acquire(6 * PAGE + 1)


async def test_one_that_leaves_the_queue_holds_nothing(admission: Admission) -> None:
    held = await admission.acquire(6 * PAGE)
    large, small = await _wait(admission, (6 * PAGE, Priority.HIGH), (1, Priority.NORMAL))
    large.cancel()
    await asyncio.wait((large,))
    assert admission.waiting == 1
    admission.release(held)
    admission.release(await small)
    assert admission.pool.used_slots == 0


async def test_one_that_leaves_just_before_it_would_be_granted(admission: Admission) -> None:
    held = await admission.acquire(6 * PAGE)
    first, second = await _wait(admission, (6 * PAGE, Priority.NORMAL), (6 * PAGE, Priority.NORMAL))
    first.cancel()
    admission.release(held)
    admission.release(await second)
    assert (admission.pool.used_pages, admission.waiting) == (0, 0)


async def test_one_that_leaves_in_the_moment_it_is_granted_gives_back(admission: Admission) -> None:
    held = await admission.acquire(6 * PAGE)
    first, second = await _wait(admission, (6 * PAGE, Priority.NORMAL), (6 * PAGE, Priority.NORMAL))
    admission.release(held)
    first.cancel()
    admission.release(await second)
    assert admission.pool.used_pages == 0
