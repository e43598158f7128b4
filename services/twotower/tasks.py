"""Background tasks that live as long as their service: none may die unnoticed, and all must end."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

log = logging.getLogger(__name__)

T = TypeVar("T")

CANCEL_AGAIN_S = 0.05


async def end_tasks(*tasks: asyncio.Task[Any]) -> None:
    """Cancel tasks until they have ended; their results and errors are dropped.

    One cancellation is not enough: a library that is cancelled while it connects or waits for a lock may swallow the
    cancellation and go on, and a loop around it would then run for ever.
    """
    while pending := [task for task in tasks if not task.done()]:
        for task in pending:
            task.cancel()
        await asyncio.wait(pending, timeout=CANCEL_AGAIN_S)
    await asyncio.gather(*tasks, return_exceptions=True)  # so that no exception is reported as never retrieved


async def until_stopped(stop: asyncio.Event, *tasks: asyncio.Task[Any]) -> None:
    """Wait for `stop`. Raises the error of a task that ends earlier, since the service cannot go on without it."""
    stopping = asyncio.create_task(stop.wait())
    try:
        done, _ = await asyncio.wait((stopping, *tasks), return_when=asyncio.FIRST_COMPLETED)
        for task in done - {stopping}:
            task.result()
            raise RuntimeError(f"{task.get_coro()} ended while the service runs")
    finally:
        await end_tasks(stopping)


def end_process(why: str) -> NoReturn:
    """End this process at once, without waiting for anything in it. Its supervisor starts it again."""
    log.critical("%s; this process ends", why)
    logging.shutdown()
    os._exit(1)


def delivered_to(take: Callable[[T], None]) -> Callable[[T], object]:
    """Returns a function that calls `take` in the running event loop, from any thread.

    An error in `take` ends the process, because results that were only partly taken leave its state inconsistent.
    """
    loop = asyncio.get_running_loop()

    def taken(results: T) -> None:
        try:
            take(results)
        except Exception as error:
            log.error("results of the engine", exc_info=error)
            end_process("what the engine had delivered could not be taken")

    return lambda results: loop.call_soon_threadsafe(taken, results)
