"""Bodies of HTTP requests: bounded each, and bounded together, so that no crowd of large ones fills the memory."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.exceptions import HTTPException
from starlette.requests import Request

from twotower.errors import Overloaded


class Bodies:
    """The bodies of all requests in flight. What a request holds beside it is of the same order."""

    def __init__(self, max_body_bytes: int, max_bodies_bytes: int) -> None:
        """`max_body_bytes`: of one. `max_bodies_bytes`: of all together."""
        self._max_one = max_body_bytes
        self._max_all = max_bodies_bytes
        self.held_bytes = 0

    @asynccontextmanager
    async def read(self, request: Request) -> AsyncIterator[bytes]:
        """The body; its bytes count for as long as the context lasts.

        Raises HTTPException (413) for one that is too large, Overloaded where others leave too little room,
        ClientDisconnect.
        """
        chunks: list[bytes] = []
        size = 0
        try:
            async for chunk in request.stream():
                if size + len(chunk) > self._max_one:
                    raise HTTPException(413, f"the body is larger than {self._max_one} bytes")
                if self.held_bytes + len(chunk) > self._max_all:
                    raise Overloaded(f"bodies of requests in flight take {self._max_all} bytes at most; try again")
                size += len(chunk)
                self.held_bytes += len(chunk)
                chunks.append(chunk)
            yield b"".join(chunks)
        finally:
            self.held_bytes -= size
