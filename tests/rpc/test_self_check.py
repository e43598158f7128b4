"""A process whose gRPC port no longer answers ends, and its supervisor sees it; other processes never do."""

from __future__ import annotations

import asyncio
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.support.checkpoints import write_tiny_checkpoint
from tests.support.http2 import call, grpc_headers
from tests.support.waiting import until
from twotower.errors import ServiceFailed
from twotower.launcher.embedded_redis import EmbeddedRedis
from twotower.rpc import self_check
from twotower.rpc.aio_server import GUARDED
from twotower.rpc.channel import open_channel
from twotower.rpc.server import RpcServer

BAD_PATH = grpc_headers(b"/twotower.v1.Inference/\xe4\xff")

WITHOUT_GUARD = """
import sys
from twotower.cli import main
from twotower.rpc import aio_server
aio_server.GUARDED = False
sys.exit(main.main(sys.argv[1:]))
"""


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_check, "PERIOD_S", 0.01)
    monkeypatch.setattr(self_check, "TIMEOUT_S", 0.5)


@pytest.mark.usefixtures("hurried")
@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "localhost"])
async def test_a_port_that_stops_answering_is_noticed(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ending: list[bool] = []
    monkeypatch.setattr("twotower.rpc.server.end_soon", lambda: ending.append(True))
    server = RpcServer(host, 0)
    await server.start([])
    await server.set_serving(True)
    watch = asyncio.create_task(server.watch())
    await asyncio.sleep(0.3)
    assert not watch.done()
    await server.server.stop(0)
    with pytest.raises(ServiceFailed, match=r"the gRPC port .* no longer answers"):
        await asyncio.wait_for(watch, 20)
    assert ending == [True]


def test_what_does_not_end_in_time_is_ended() -> None:
    code = "import time; from twotower.rpc import self_check; self_check.END_S = 0.1; self_check.end_soon(); time.sleep(60)"
    assert subprocess.run([sys.executable, "-c", code], timeout=30, check=False).returncode == 1


@pytest.mark.usefixtures("hurried")
async def test_one_silence_is_forgiven(monkeypatch: pytest.MonkeyPatch) -> None:
    heard = iter([True, False, False, True, False, False, True, False, False, False])
    asked = 0

    async def answers(host: str, port: int) -> bool:
        nonlocal asked
        asked += 1
        return next(heard)

    monkeypatch.setattr(self_check, "answers", answers)
    with pytest.raises(ServiceFailed):
        await self_check.watch_port("127.0.0.1", 1)
    assert asked == 10


async def test_a_listener_that_never_answers_is_not_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_check, "TIMEOUT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        assert not await self_check.answers("127.0.0.1", deaf.getsockname()[1])


async def test_a_refusal_is_an_answer() -> None:
    server = grpc.aio.server()  # without health: UNIMPLEMENTED
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    assert await self_check.answers("127.0.0.1", port)
    await server.stop(0)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.fixture
async def redis() -> AsyncIterator[EmbeddedRedis]:
    server = EmbeddedRedis(lambda line: None)
    await server.start()
    yield server
    await server.stop()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@asynccontextmanager
async def service(kind: str, guarded: bool, *options: str) -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    """A service as a process, and the address of its gRPC port, which listens."""
    port = free_port()
    how = ("-m", "twotower.cli.main") if guarded else ("-c", WITHOUT_GUARD)
    ports = ("--grpc-port", str(port), "--http-port", "0") if kind == "gateway" else ("--port", str(port))
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(sys.executable, *how, kind, *ports, *options, stdout=pipe, stderr=pipe)
    try:
        if kind == "gateway":  # which is not ready, as it is alone
            await until(lambda: listens(port) or process.returncode is not None, 60)
        else:
            assert process.stdout is not None
            assert await asyncio.wait_for(process.stdout.readline(), 60)
        assert process.returncode is None
        yield process, f"127.0.0.1:{port}"
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


KINDS = ["gateway", "context", "denoiser"]


@pytest.mark.parametrize("kind", KINDS)
async def test_a_service_outlives_a_path_that_is_not_utf8(kind: str, checkpoint: Path, redis: EmbeddedRedis) -> None:
    async with service(kind, True, "--checkpoint", str(checkpoint), "--redis", redis.url) as (process, address):
        assert b"grpc-status\x0212" in await call(address, BAD_PATH)
        async with open_channel(address) as channel:
            await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)
        process.send_signal(signal.SIGTERM)
        _, log = await asyncio.wait_for(process.communicate(), 30)
        assert process.returncode == 0
        assert "Traceback" not in log.decode()


@pytest.mark.skipif(not GUARDED, reason="this grpcio's port does not die so")
@pytest.mark.parametrize("kind", KINDS)
async def test_a_service_whose_port_has_died_ends(kind: str, checkpoint: Path, redis: EmbeddedRedis) -> None:
    async with service(kind, False, "--checkpoint", str(checkpoint), "--redis", redis.url) as (process, address):
        await call(address, BAD_PATH)
        _, log = await asyncio.wait_for(process.communicate(), 30)
        if process.returncode != -signal.SIGSEGV:  # grpcio may crash over what is left of its loop: that is an end as well
            assert process.returncode == 1
            assert f"the port {address} is given up: this process ends" in log.decode()
