"""A stack whose service keeps dying; the Redis it brings along."""

from __future__ import annotations

import os
import signal
import stat
from pathlib import Path

import pytest

from tests.support.checkpoints import write_tiny_checkpoint
from tests.support.redis_server import embedded_redis
from twotower.client.grpc_client import GatewayClient
from twotower.engine.local import LocalEngine
from twotower.errors import ConfigError, ServiceFailed
from twotower.events import Block
from twotower.launcher import embedded_redis as embedded
from twotower.launcher import stack as stack_module
from twotower.launcher.config import FEW_CORES, MOST_CORES, UpConfig, usable_cores
from twotower.launcher.stack import stack
from twotower.request import GenerationParams


async def test_a_service_that_dies_too_often_ends_the_stack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stack_module, "MAX_RESTARTS", 0)
    log: list[str] = []
    async with stack(UpConfig(write_tiny_checkpoint(tmp_path)), log.append) as running:
        denoiser = running.towers[1]
        assert denoiser.pid is not None
        os.kill(denoiser.pid, signal.SIGKILL)
        with pytest.raises(ServiceFailed, match=r"^denoiser-0 was killed by signal 9; it ended 1 times in a minute$"):
            await running.failed()
        processes = [*running.towers, running.gateway]
    assert [process.pid for process in processes if process is not None] == [None] * 3


async def test_towers_of_different_precision_serve_together(tmp_path: Path) -> None:
    path = write_tiny_checkpoint(tmp_path)
    params = GenerationParams(max_tokens=40, steps=4, gamma=1.0)
    config = UpConfig(path, contexts=2, experts="fp4", context_experts="fp8", threads=1)
    async with stack(config, lambda line: None) as running, GatewayClient(running.grpc_address) as client:
        events = client.generate((5, 6, 7), max_tokens=40, steps=4, gamma=1.0, ignore_eos=True)
        tokens = [token async for event in events if isinstance(event, Block) for token in event.token_ids]
    engine = LocalEngine(path, threads=1, experts="fp4", context_experts="fp8")
    assert tokens == engine.generate([5, 6, 7], params).token_ids
    with pytest.raises(ConfigError, match="experts"):
        async with stack(UpConfig(path, experts="fp5"), lambda line: None):
            pass


def test_threads_are_shared_out(tmp_path: Path) -> None:
    cores = usable_cores()
    for config in (UpConfig(tmp_path), UpConfig(tmp_path, denoisers=3), UpConfig(tmp_path, contexts=100, denoisers=1000)):
        share = cores // (config.contexts + config.denoisers)
        few = 1 <= share < FEW_CORES and cores <= MOST_CORES
        assert config.tower_threads == (cores if few else max(1, share))
        assert config.turns == (few or cores == 1)
    assert UpConfig(tmp_path, threads=cores).turns
    assert not UpConfig(tmp_path, threads=1).turns or cores == 1
    assert UpConfig(tmp_path, threads=7).tower_threads == 7


async def test_the_embedded_redis_is_its_users_alone_and_leaves_nothing() -> None:
    async with embedded_redis() as server:
        socket = Path(server.url.removeprefix("unix://"))
        assert stat.S_IMODE(socket.parent.stat().st_mode) == 0o700
        assert stat.S_ISSOCK(os.stat(socket).st_mode)
    assert not socket.parent.exists()


async def test_a_platform_without_an_embedded_redis(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> Path:
        raise embedded.ValkeyBinaryNotFoundError("no binary for this one")

    monkeypatch.setattr(embedded, "get_binary_path", none)
    with pytest.raises(ServiceFailed, match="give one with --redis URL"):
        await embedded.EmbeddedRedis(lambda line: None).start()


def test_cores_that_may_not_be_used_do_not_count(tmp_path: Path) -> None:
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        assert UpConfig(tmp_path).tower_threads == 1
    finally:
        os.sched_setaffinity(0, allowed)
