"""A real child that ends, hangs or cannot start, and is started again."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from tests.support.waiting import until
from twotower.launcher.backoff import Backoff
from twotower.launcher.process import ServiceProcess
from twotower.launcher.supervisor import Supervised, supervise
from twotower.tasks import end_tasks

WORKS = "import time; print('ready', flush=True); time.sleep(600)"


class Child:
    """A child under supervision, and what was said of it."""

    def __init__(self, code: str) -> None:
        self.said: list[str] = []
        self.process = ServiceProcess("x-0", [sys.executable, "-c", code], self.said.append)
        self.well = True
        self.service = Supervised(self.process, self._start, self._answers, Backoff(first_s=0.01, max_s=0.04, stable_s=60))

    async def _start(self) -> None:
        await self.process.start()
        await self.process.wait_ready(20)

    async def _answers(self, timeout_s: float) -> bool:
        return self.well

    def starts(self) -> int:
        return sum("starting it again" in line for line in self.said)


@asynccontextmanager
async def supervised(code: str = WORKS, unhealthy_after_s: float = 0) -> AsyncIterator[Child]:
    child = Child(code)
    await child._start()
    task = asyncio.create_task(supervise(child.service, unhealthy_after_s, child.said.append))
    try:
        yield child
        assert not task.done()
    finally:
        await end_tasks(task)
        await child.process.kill()


async def test_however_often_it_is_killed_it_comes_back() -> None:
    async with supervised() as child:
        for deaths in range(1, 7):
            pid = child.process.pid
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
            await until(lambda deaths=deaths: child.starts() == deaths and child.process.pid is not None)  # type: ignore[misc]
            await until(lambda: not child.process._starting)
    lines = [line for line in child.said if "starting it again" in line]
    assert lines[0] == "[up] x-0 was killed by signal 9; starting it again"
    assert lines[1] == "[up] x-0 was killed by signal 9; starting it again in 0.01 s: end 2 in a row"
    assert lines[5].endswith("in 0.04 s: end 6 in a row")


async def test_one_that_cannot_start_any_more_is_tried_until_it_can(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    code = f"import os, sys; os.path.exists({str(broken)!r}) and sys.exit('error: no luck')\n{WORKS}"
    async with supervised(code) as child:
        broken.touch()
        assert child.process.pid is not None
        os.kill(child.process.pid, signal.SIGKILL)
        await until(lambda: child.starts() >= 6)
        assert any("[up] x-0: no luck; starting it again in 0.04 s" in line for line in child.said)
        broken.unlink()
        await until(lambda: child.process.pid is not None and not child.process._starting)


async def test_one_that_does_not_answer_is_replaced_even_if_it_is_stopped() -> None:
    async with supervised(unhealthy_after_s=0.2) as child:
        first = child.process.pid
        assert first is not None
        await asyncio.sleep(0.5)  # several checks that it passes
        assert child.process.pid == first
        os.kill(first, signal.SIGSTOP)
        child.well = False
        await until(lambda: child.process.pid not in (first, None))
        child.well = True
        await until(lambda: child.starts() == 1 and not child.process._starting)
    assert "[up] x-0 has not answered for 0.2 s: killing it" in child.said


async def test_silence_is_allowed_where_nobody_asks() -> None:
    async with supervised() as child:
        child.well = False
        pid = child.process.pid
        await asyncio.sleep(0.3)
        assert child.process.pid == pid
