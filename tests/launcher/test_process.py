"""A child process: ready, relayed, explained, stopped."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from twotower.errors import ServiceFailed
from twotower.launcher.process import ServiceProcess


@asynccontextmanager
async def child(code: str) -> AsyncIterator[tuple[ServiceProcess, list[str]]]:
    """A Python program as a service, and what it said on stderr."""
    said: list[str] = []
    process = ServiceProcess("x-0", [sys.executable, "-u", "-c", "import os, signal, sys, time\n" + code], said.append)
    await process.start()
    try:
        yield process, said
    finally:
        await process.stop(10)


async def test_ready_and_relayed() -> None:
    code = "print('hello', file=sys.stderr); print('noise'); print('ready grpc=h:1 http=h:2'); time.sleep(60)"
    async with child(code) as (process, said):
        assert await process.wait_ready(20) == {"grpc": "h:1", "http": "h:2"}
        pid = process.pid
        assert pid is not None
    assert process.pid is None
    assert said == ["[x-0] hello"]


async def test_what_it_died_of_is_told_once() -> None:
    async with child("print('error: no luck', file=sys.stderr); sys.exit(1)") as (process, said):
        with pytest.raises(ServiceFailed, match=r"^x-0: no luck$"):
            await process.wait_ready(20)
    assert said == []


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("sys.exit(3)", "x-0 ended with status 3"),
        ("print('Segmentation', file=sys.stderr); sys.exit(4)", "x-0 ended with status 4: Segmentation"),
        ("print('all is well', file=sys.stderr); os.kill(os.getpid(), 9)", "x-0 was killed by signal 9"),
        ("print('bad magic', file=sys.stderr); os.abort()", "x-0 was killed by signal 6: bad magic"),
    ],
)
async def test_deaths_without_a_word(code: str, why: str) -> None:
    async with child(code) as (process, _):
        with pytest.raises(ServiceFailed) as caught:
            await process.wait_ready(20)
    assert str(caught.value) == why


async def test_never_ready() -> None:
    async with child("time.sleep(60)") as (process, _):
        with pytest.raises(ServiceFailed, match="x-0 was not ready within 0 s"):
            await process.wait_ready(0.1)


async def test_one_that_does_not_drain_is_killed() -> None:
    code = "signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready'); time.sleep(60)"
    async with child(code) as (process, said):
        await process.wait_ready(20)
        await process.stop(0.2)
        assert process.pid is None
        assert process.explain() == "x-0 was killed by signal 9"
    assert said == ["[x-0] did not drain within 0 s: killed"]


async def test_much_output_blocks_nobody() -> None:
    code = (
        "print('ready')\n"
        "for stream in (sys.stdout, sys.stderr):\n"
        "    for _ in range(30): stream.write('x' * 100_000)\n"
        "    stream.write('\\n')\n"
        "print('last', file=sys.stderr); sys.exit(0)"
    )
    async with child(code) as (process, said):
        await process.wait_ready(20)
        assert await process.wait() == 0
    assert said[-1] == "[x-0] last"


async def test_a_program_that_is_not_there() -> None:
    process = ServiceProcess("x-0", ["/no/such/program"], lambda line: None)
    await process.start()
    with pytest.raises(ServiceFailed, match=r"/no/such/program cannot be started: No such file"):
        await process.wait_ready(20)
    await process.stop(1)
