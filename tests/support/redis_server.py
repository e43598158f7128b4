"""A real Redis-compatible server for tests: the embedded Valkey, or Debian's redis-server where it is installed."""

from __future__ import annotations

import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

from twotower.launcher.embedded_redis import EmbeddedRedis


@asynccontextmanager
async def embedded_redis() -> AsyncIterator[EmbeddedRedis]:
    """Listening when entered, gone when left."""
    server = EmbeddedRedis(lambda line: None)
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


@contextmanager
def debian_redis() -> Iterator[str]:
    """URL of a redis-server that is found on the PATH."""
    binary = shutil.which("redis-server")
    assert binary is not None
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    with tempfile.TemporaryDirectory() as directory:
        options = ["--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", directory]
        process = subprocess.Popen([binary, *options], stdout=subprocess.DEVNULL)
        try:
            for _ in range(200):
                with socket.socket() as sock:
                    if sock.connect_ex(("127.0.0.1", port)) == 0:
                        break
                time.sleep(0.02)
            yield f"redis://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait()
