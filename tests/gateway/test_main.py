"""The gateway as a process, with a real Redis: ready, drain, and every way not to start."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.request import urlopen

import pytest

from tests.support.gateways import gateway, replica
from tests.support.scripted_context import ScriptedContext
from tests.support.waiting import until
from twotower.broker.connection import connect
from twotower.broker.registry import Registry
from twotower.client.grpc_client import GatewayClient
from twotower.errors import Unavailable
from twotower.events import Block
from twotower.launcher.embedded_redis import EmbeddedRedis
from twotower.model.checkpoint import Checkpoint

from .test_failures import SCRIPT, collect

COMMAND = (sys.executable, "-m", "twotower.cli.main", "gateway", "--grpc-port", "0", "--http-port", "0")


@pytest.fixture
async def redis() -> AsyncIterator[EmbeddedRedis]:
    server = EmbeddedRedis(lambda line: None)
    await server.start()
    yield server
    await server.stop()


@asynccontextmanager
async def process(*arguments: str) -> AsyncIterator[asyncio.subprocess.Process]:
    pipe = asyncio.subprocess.PIPE
    running = await asyncio.create_subprocess_exec(*COMMAND, *arguments, stdout=pipe, stderr=pipe)
    try:
        yield running
    finally:
        if running.returncode is None:
            running.kill()
        await running.communicate()


def test_the_gateway_needs_no_torch() -> None:
    code = "import sys, twotower.gateway.main, twotower.client.grpc_client; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


async def test_from_start_to_drain(checkpoint: Path, redis: EmbeddedRedis) -> None:
    """Ready with a context and a denoiser of this checkpoint, not before; SIGTERM lets requests finish."""
    go_on = asyncio.Event()

    async def before(number: int) -> None:
        if number == 1:
            await go_on.wait()

    context = ScriptedContext(SCRIPT, before)
    address = await context.start()
    client_of_redis = await connect(redis.url)
    registry = Registry(client_of_redis, Checkpoint.open(checkpoint).identity)
    other = Registry(client_of_redis, "another")
    for kind in ("context", "denoiser"):
        await other.announce(replica(kind, "other", address))
    async with process("--checkpoint", str(checkpoint), "--redis", redis.url) as child:
        assert child.stdout is not None
        line = asyncio.create_task(child.stdout.readline())
        await registry.announce(replica("context", "c", address))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.shield(line), 2.5)  # no denoiser yet
        announcing = asyncio.create_task(_announce(registry, address))
        word, grpc, http = (await asyncio.wait_for(line, 20)).decode().split()
        assert word == "ready"
        body = await asyncio.to_thread(lambda: urlopen(f"http://{http.removeprefix('http=')}/readyz", timeout=10).read())
        assert json.loads(body) == {"status": "ready"}
        async with GatewayClient(grpc.removeprefix("grpc=")) as client:
            held = asyncio.create_task(collect(client, max_tokens=10))
            await until(lambda: context.running)
            await redis.stop()  # what runs does not need it
            child.send_signal(signal.SIGTERM)
            with pytest.raises(Unavailable):
                await client.wait_ready(0.5)
            go_on.set()
            assert (await held)[0] == SCRIPT[:10]
        assert await asyncio.wait_for(child.wait(), 20) == 0
        assert child.stderr is not None
        assert "Traceback" not in (await child.stderr.read()).decode()
    announcing.cancel()
    await asyncio.gather(announcing, return_exceptions=True)
    await client_of_redis.aclose()
    await context.stop()


async def _announce(registry: Registry, address: str) -> None:
    while True:
        await registry.announce(replica("context", "c", address))
        await registry.announce(replica("denoiser", "d", address))
        await asyncio.sleep(1)


async def test_a_gateway_that_is_not_ready_yet_stops_too(checkpoint: Path, redis: EmbeddedRedis) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    async with process("--checkpoint", str(checkpoint), "--redis", redis.url, "--http-port", str(port)) as child:
        await until(lambda: _listens(port))
        child.send_signal(signal.SIGTERM)
        out, _ = await asyncio.wait_for(child.communicate(), 20)
        assert (child.returncode, out) == (0, b"")


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


async def refused(*arguments: str) -> str:
    """The one line with which the gateway refuses to start."""
    async with process(*arguments) as child:
        out, err = await asyncio.wait_for(child.communicate(), 30)
    assert child.returncode == 1
    assert out == b""
    (line,) = err.decode().splitlines()
    assert line.startswith("error: ")
    return line


@pytest.mark.parametrize("option", ["--grpc-port", "--http-port"])
async def test_a_taken_port(checkpoint: Path, redis: EmbeddedRedis, option: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        line = await refused("--checkpoint", str(checkpoint), "--redis", redis.url, option, port)
    assert f"127.0.0.1:{port} ({option}): Address already in use" in line


async def test_what_else_it_cannot_start_with(
    checkpoint: Path, redis: EmbeddedRedis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        nobody = f"redis://user:secret@127.0.0.1:{unused.getsockname()[1]}"
    with monkeypatch.context() as given:
        given.setenv("TWOTOWER_REDIS_URL", nobody)
        line = await refused("--checkpoint", str(checkpoint))
    assert "does not answer" in line
    assert "secret" not in line
    assert "does not exist" in await refused("--checkpoint", str(tmp_path / "none"), "--redis", redis.url)
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for name in ("config.json", "model.safetensors"):
        (damaged / name).write_bytes((checkpoint / name).read_bytes())
    (damaged / "tokenizer.json").write_text("{}")
    assert "tokenizer.json is no tokenizer" in await refused("--checkpoint", str(damaged), "--redis", redis.url)


async def test_a_context_process_that_is_killed(checkpoint: Path, tmp_path: Path) -> None:
    """SIGKILL in the middle: the port is closed by the kernel, and the session goes on elsewhere."""
    script = tmp_path / "context.py"
    script.write_text(
        "import asyncio\n"
        "from tests.support.scripted_context import ScriptedContext\n"
        "from tests.gateway.test_failures import SCRIPT, hang_at\n"
        "async def main():\n"
        "    print(await ScriptedContext(SCRIPT, hang_at(2)).start(), flush=True)\n"
        "    await asyncio.Event().wait()\n"
        "asyncio.run(main())\n"
    )
    doomed = await asyncio.create_subprocess_exec(
        sys.executable, str(script), stdout=asyncio.subprocess.PIPE, env={"PYTHONPATH": str(Path(__file__).parents[2])}
    )
    assert doomed.stdout is not None
    address = (await doomed.stdout.readline()).decode().strip()
    other = ScriptedContext(SCRIPT)
    preferred = replica("context", "doomed", address, load=-1)
    async with gateway(checkpoint, other, replicas=[preferred]) as running, running.client() as client:
        ids: list[int] = []
        async for event in client.generate([5], max_tokens=30):
            if isinstance(event, Block):
                ids += event.token_ids
                if event.index == 1:
                    doomed.kill()
    await doomed.communicate()
    assert ids == SCRIPT[:30]
    assert [request.generated for request in other.opened] == [8]
