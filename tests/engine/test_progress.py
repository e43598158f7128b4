"""An engine that hangs is noticed."""

from __future__ import annotations

import asyncio
import subprocess
import sys

import pytest

from twotower.engine.progress import FACTOR, Progress
from twotower.errors import EngineStuck


class _Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_forward_is_overdue_beyond_the_floor_and_what_has_been_seen() -> None:
    clock = _Clock()
    progress = Progress(10.0, clock)
    assert progress.overdue_s == 0
    with progress.forward():
        clock.now += 9
        assert progress.overdue_s == 0
        clock.now += 2
        assert progress.overdue_s == 1
    assert progress.overdue_s == 0
    assert progress.forwards == 1
    with progress.forward():  # one has been seen to take 11 s
        clock.now += FACTOR * 11
        assert progress.overdue_s == 0
        clock.now += 1
        assert progress.overdue_s == 1


def test_a_forward_that_fails_is_over() -> None:
    progress = Progress(10.0)
    with pytest.raises(RuntimeError), progress.forward():
        raise RuntimeError
    assert progress.overdue_s == 0


async def test_the_watch_raises() -> None:
    clock = _Clock()
    progress = Progress(10.0, clock)
    watching = asyncio.create_task(progress.watch())
    with progress.forward():
        clock.now += 60
        with pytest.raises(EngineStuck, match="60 s"):
            await asyncio.wait_for(watching, 10)


def test_a_process_whose_engine_hangs_ends() -> None:
    """Though a thread of it never returns."""
    script = """
import asyncio, threading
from twotower.engine.progress import Progress
from twotower.engine.thread import EngineThread

async def main():
    progress, thread = Progress(0.2), EngineThread("engine")

    def hang():
        with progress.forward():
            threading.Event().wait()

    working = asyncio.create_task(thread.run(hang))
    await progress.guard()

asyncio.run(main())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "a forward has not returned" in done.stderr
