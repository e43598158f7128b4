"""uvicorn inside a loop that runs other things too: it takes no signals, writes no access log, never exits the process."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator

import uvicorn
from starlette.types import ASGIApp

from twotower.gateway.http_protocol import BoundedProtocol
from twotower.rpc.address import join_address, listening_socket

ACCEPTED_AT_ONCE = 8
"""Connections that are accepted before the streams of others go on."""
BACKLOG = 2048
"""Connections that wait for it."""


class _HttpServer(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:  # signals are main's
        yield


class HttpServer:
    """An ASGI application on one address."""

    def __init__(self, app: ASGIApp, host: str, port: int, option: str) -> None:
        """Listen at once, so that the port is known or refused. Raises PortInUse, which names `option`."""
        self._host = host
        self._socket = listening_socket(host, port, option)
        config = uvicorn.Config(
            app,
            http=BoundedProtocol,
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="warning",
            access_log=False,
            backlog=ACCEPTED_AT_ONCE,
        )
        self._server = _HttpServer(config)
        self._task: asyncio.Task[None] | None = None

    @property
    def address(self) -> str:
        """`host:port` that is listened on."""
        return join_address(self._host, self._socket.getsockname()[1])

    async def start(self) -> None:
        """Return once requests are answered."""
        self._task = asyncio.create_task(self._server.serve(sockets=[self._socket]))
        while not self._server.started and not self._task.done():  # noqa: ASYNC110  # uvicorn has no event for it
            await asyncio.sleep(0.01)
        if self._task.done():
            await self._task  # for its error
        self._socket.listen(BACKLOG)  # asyncio made it as short as what it accepts at once

    async def stop(self, grace_s: float) -> None:
        """Listen no more, wait for running requests up to `grace_s`, cancel the rest."""
        if self._task is None:
            self._socket.close()
            return
        self._server.config.timeout_graceful_shutdown = grace_s  # type: ignore[assignment]  # given to wait_for
        self._server.should_exit = True
        await self._task
