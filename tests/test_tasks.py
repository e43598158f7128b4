"""Background tasks end, and none dies unnoticed."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from twotower.tasks import end_tasks, until_stopped


async def test_a_task_that_swallows_its_first_cancellation_is_ended() -> None:
    async def stubborn() -> None:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(3600)
        await asyncio.sleep(3600)

    task = asyncio.create_task(stubborn())
    await asyncio.sleep(0)
    async with asyncio.timeout(5):
        await end_tasks(task)
    assert task.cancelled()
    await end_tasks(task)


async def test_stop_and_death() -> None:
    async def fail() -> None:
        raise ValueError("broken")

    async def end() -> None:
        return

    forever = asyncio.create_task(asyncio.sleep(3600))
    stop = asyncio.Event()
    with pytest.raises(ValueError, match="broken"):
        await until_stopped(stop, forever, asyncio.create_task(fail()))
    with pytest.raises(RuntimeError, match="ended while the service runs"):
        await until_stopped(stop, forever, asyncio.create_task(end()))
    stop.set()
    await until_stopped(stop, forever)
    assert not forever.done()
    await end_tasks(forever)
