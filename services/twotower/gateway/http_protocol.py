"""uvicorn's HTTP/1.1 connections, bounded: the size of a head, and the time that a client may take to send what it began."""

from __future__ import annotations

import asyncio
import logging
import re
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

log = logging.getLogger(__name__)

HEAD_S = 10.0
"""From a connection's first moment, or a request's first byte, to the end of its headers."""
MAX_HEAD_BYTES = 64 * 1024
"""Request line and headers."""
MAX_HEADERS = 200
REST_S = 5.0
"""For the rest of a body whose request has been answered; it is read and dropped, so that the client sees the answer."""
MAX_BEGINNING = 256
"""Connections that have not yet sent a whole head, before the oldest gives way."""
YIELD_S = 0.5
"""How old it must be for that: many connections at once are no fault."""


_UPGRADE = re.compile(rb"(\A|\n)upgrade:", re.IGNORECASE)
"""An offer to go on in another protocol, which is never taken: the parser, told of it, would drop the body."""


class BoundedProtocol(HttpToolsProtocol):
    """One connection. Bodies are bounded where they are read (bodies.py)."""

    _beginning: dict[BoundedProtocol, float] = {}  # noqa: RUF012  # of all connections, and since when; the oldest first
    _limit: asyncio.TimerHandle | None = None
    _in_head = True
    _head_bytes = 0
    _whole = True
    """Whether the request has been received to its end."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # uvicorn's own narrowing
        """Give the connection its time for a head."""
        super().connection_made(transport)
        self._begin()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self._beginning.pop(self, None)
        self._disarm()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse; a head that grows without end is refused."""
        counted = self._in_head
        if counted and _UPGRADE.search(data):
            head, end, body = data.partition(b"\r\n\r\n")
            data = _UPGRADE.sub(b"\\1x-grade:", head) + end + body
        self._head_bytes += len(data) if counted else 0
        super().data_received(data)
        if counted and self._in_head and self._head_bytes > MAX_HEAD_BYTES:
            self._refuse("431 Request Header Fields Too Large", f"the headers are larger than {MAX_HEAD_BYTES} bytes")
        if self._whole and not self._in_head and self._limit is None and self.cycle.response_complete:
            self._arm(HEAD_S, self._close)  # what came between two requests, such as line ends, does not keep a connection

    def on_message_begin(self) -> None:
        """The first byte of a request."""
        super().on_message_begin()
        self._whole = False
        if not self._in_head:  # another request on the same connection
            self._begin()

    def on_headers_complete(self) -> None:
        """The end of a request's headers."""
        self._beginning.pop(self, None)
        self._disarm()
        self._in_head = False
        size = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        if size > MAX_HEAD_BYTES or len(self.headers) > MAX_HEADERS:
            problem = f"the headers are larger than {MAX_HEAD_BYTES} bytes, or more than {MAX_HEADERS}"
            self._refuse("431 Request Header Fields Too Large", problem)
            return
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """A piece of a body, dropped once the connection is to be closed."""
        if not self.transport.is_closing():
            super().on_body(body)

    def on_message_complete(self) -> None:
        """The end of a request."""
        self._whole = True
        if not self.transport.is_closing():
            super().on_message_complete()

    def on_response_complete(self) -> None:
        """The end of an answer, perhaps before the end of its request."""
        super().on_response_complete()
        if not self._whole and not self.transport.is_closing():
            self._arm(REST_S, self.transport.close)

    def _begin(self) -> None:
        self._in_head, self._head_bytes = True, 0
        self._arm(HEAD_S, self._too_slow)
        now = self.loop.time()
        self._beginning[self] = now
        oldest = next(iter(self._beginning))
        if len(self._beginning) > MAX_BEGINNING and now - self._beginning[oldest] >= YIELD_S:
            oldest._close()

    def _too_slow(self) -> None:
        if self._whole:  # nothing was begun
            self._close()
        else:
            self._refuse("408 Request Timeout", f"the headers did not come within {HEAD_S:.0f} s")

    def _refuse(self, status: str, problem: str) -> None:
        """An answer without a request that the application could give one to."""
        if not self.transport.is_closing():
            head = f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\nconnection: close\r\n"
            body = f'{{"error": {{"message": "{problem}", "type": "invalid_request_error", "param": null, "code": null}}}}'
            self.transport.write(f"{head}content-length: {len(body)}\r\n\r\n{body}".encode())
        self._close()

    def _close(self) -> None:
        self._beginning.pop(self, None)
        self._disarm()
        self.transport.close()

    def _arm(self, seconds: float, then: Any) -> None:
        self._disarm()
        self._limit = self.loop.call_later(seconds, then)

    def _disarm(self) -> None:
        if self._limit is not None:
            self._limit.cancel()
            self._limit = None
