"""Keeps one service running: restarts it when it ends, and kills it first when it no longer answers."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from twotower.errors import ServiceFailed
from twotower.launcher.backoff import Backoff
from twotower.launcher.process import Say, ServiceProcess
from twotower.tasks import end_tasks

CHECKS = 5
"""Failed checks in a row after which a service is killed. They are counted rather than timed, so that a launcher that was
itself suspended does not kill its children."""


@dataclass(slots=True)
class Supervised:
    """A service, and how to start and check it. `start` and `answers` act on its present process."""

    process: ServiceProcess
    start: Callable[[], Awaitable[object]]
    """Starts it, and waits until it is ready. Raises ServiceFailed."""
    answers: Callable[[float], Awaitable[bool]]
    """Whether it answers within a number of seconds."""
    backoff: Backoff = field(default_factory=Backoff)


async def supervise(service: Supervised, unhealthy_after_s: float, say: Say) -> None:
    """Restart `service`, which is ready, whenever it ends, until cancelled.

    unhealthy_after_s: how long it may not answer before it is killed; 0: it is never killed.
    """
    clock = asyncio.get_running_loop().time
    while True:
        ready_since = clock()
        await _until_ended(service, unhealthy_after_s, say)
        why, ready_s = service.process.explain(), clock() - ready_since
        while True:
            wait_s = service.backoff.ended(ready_s)
            say(f"[up] {why}; starting it again" + (f" in {wait_s:g} s: end {service.backoff.ends} in a row" if wait_s else ""))
            await asyncio.sleep(wait_s)
            try:
                await service.start()
                break
            except ServiceFailed as error:
                await service.process.kill()  # the process may hang
                why, ready_s = str(error), 0.0


async def _until_ended(service: Supervised, unhealthy_after_s: float, say: Say) -> None:
    """Wait until the service ends; kill it when it no longer answers."""
    ended = asyncio.create_task(service.process.wait())
    waits: list[asyncio.Task[object]] = [ended]
    if unhealthy_after_s:
        waits.append(asyncio.create_task(_until_silent(service, unhealthy_after_s)))
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        if not ended.done():
            waits[1].result()  # raises the check's error
            say(f"[up] {service.process.name} has not answered for {unhealthy_after_s:g} s: killing it")
            await service.process.kill()
    finally:
        await end_tasks(*waits)


async def _until_silent(service: Supervised, after_s: float) -> None:
    """Return once the service has failed `CHECKS` checks in a row, `after_s` seconds in all."""
    period_s, failed = after_s / CHECKS, 0
    while failed < CHECKS:
        answered, _ = await asyncio.gather(service.answers(period_s), asyncio.sleep(period_s))
        failed = 0 if answered else failed + 1
