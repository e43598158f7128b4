"""Bodies of HTTP requests: bounded in size, each and together, and in time, so that large or slow ones are in nobody's way."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from starlette.exceptions import HTTPException
from starlette.requests import Request

from twotower.errors import InvalidArgument, Overloaded

WHOLE_S = 60.0
"""For a whole body, from its first byte."""
STALL_S = 10.0
"""Between two pieces of a body."""
YIELD_S = 0.5
"""A body of which nothing came for this long gives way to others when there is no room."""

INFLATE_STEP = 64 * 1024
"""Bytes that a compressed body becomes without a pause: a fraction of a millisecond's work."""

CLOSE = {"connection": "close"}
"""The rest of a refused body is not waited for."""


PROMPTS = 16
"""That fill the context, in a body of the largest size."""
ID_BYTES = 8
"""Of a token id in JSON, with its comma."""
LEAST, MOST = 1 << 20, 8 << 20
LARGEST = 8
"""Bodies of the largest size at once."""


def body_limits(max_body: int | None, max_bodies: int | None, max_context: int, token_bytes: int | None) -> tuple[int, int]:
    """Bytes of one body and of all, where they are not set: from what a prompt can take.

    `token_bytes`: of text, for one token at most; None: unknown.
    """
    if max_body is None:
        max_body = MOST if token_bytes is None else PROMPTS * max_context * max(token_bytes, ID_BYTES)
        max_body = min(max(max_body, LEAST), MOST)
    return max_body, LARGEST * max_body if max_bodies is None else max_bodies


@dataclass(eq=False, slots=True)
class _Upload:
    """A body that is being received."""

    limit: asyncio.Timeout
    last: float
    """When a piece of it came, by the loop's clock."""
    size: int = 0
    lost: bool = False
    """It gave way; its bytes no longer count."""


class Bodies:
    """The bodies of all requests in flight. What a request holds beside it is of the same order."""

    def __init__(self, max_body_bytes: int, max_bodies_bytes: int) -> None:
        """`max_body_bytes`: of one. `max_bodies_bytes`: of all together."""
        self._max_one = max_body_bytes
        self._max_all = max_bodies_bytes
        self._uploads: dict[_Upload, None] = {}  # the one that is silent the longest first
        self.held_bytes = 0

    @asynccontextmanager
    async def read(self, request: Request) -> AsyncIterator[bytearray]:
        """The body; its bytes count for as long as the context lasts, though whoever has parsed it should clear it.

        One in gzip is inflated on its way in, and is as large as what it becomes. Raises HTTPException (413: it is too large;
        408: it comes too slowly; 415: it is compressed in another way), InvalidArgument where it is no gzip, Overloaded where
        others leave too little room, ClientDisconnect.
        """
        self._check_size(request.headers.get("content-length"))
        coding = request.headers.get("content-encoding", "identity").strip().lower()
        if coding not in ("identity", "gzip", "x-gzip"):
            raise HTTPException(
                415, f"content-encoding: {coding[:20]!r} is not supported; send gzip, or the body as it is", CLOSE
            )
        inflater = None if coding == "identity" else _Inflater()
        clock = asyncio.get_running_loop().time
        end = clock() + WHOLE_S
        body = bytearray()
        upload = _Upload(asyncio.timeout(STALL_S), clock())
        self._uploads[upload] = None
        try:
            try:
                async with upload.limit:
                    async for chunk in request.stream():
                        for piece in inflater.pieces(chunk) if inflater else (chunk,):
                            self._take(upload, len(piece))
                            body += piece
                            if inflater:
                                await asyncio.sleep(0)
                        upload.last = clock()
                        upload.limit.reschedule(min(end, upload.last + STALL_S))
                        self._uploads[upload] = self._uploads.pop(upload)
            except TimeoutError:
                raise HTTPException(408, "the body came too slowly", CLOSE) from None
            finally:
                self._uploads.pop(upload, None)
            if inflater:
                inflater.check_end()
            yield body
        finally:
            if not upload.lost:
                self.held_bytes -= upload.size

    def _check_size(self, announced: str | None) -> None:
        if announced is not None and announced.isdecimal() and int(announced) > self._max_one:
            self._refuse_size()

    def _refuse_size(self) -> None:
        raise HTTPException(413, f"the body is larger than {self._max_one} bytes", CLOSE)

    def _take(self, upload: _Upload, size: int) -> None:
        if upload.size + size > self._max_one:
            self._refuse_size()
        while self.held_bytes + size > self._max_all:
            self._make_room(upload)
        upload.size += size
        self.held_bytes += size

    def _make_room(self, upload: _Upload) -> None:
        """Let go of a body that has stalled. Raises Overloaded where there is none."""
        now = asyncio.get_running_loop().time()
        stalled = next(iter(self._uploads))
        if stalled is upload or now - stalled.last < YIELD_S:
            raise Overloaded(f"bodies of requests in flight take {self._max_all} bytes at most; try again")
        del self._uploads[stalled]
        stalled.lost = True
        stalled.limit.reschedule(now)
        self.held_bytes -= stalled.size


class _Inflater:
    """A body in gzip."""

    def __init__(self) -> None:
        self._stream = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)

    def pieces(self, data: bytes) -> Iterator[bytes]:
        """What some more of it becomes, in pieces of at most `INFLATE_STEP` bytes. Raises InvalidArgument."""
        while data:
            if self._stream.eof:
                raise InvalidArgument("body", "holds more behind the end of its gzip stream")
            try:
                piece = self._stream.decompress(data, INFLATE_STEP)
            except zlib.error as error:
                raise InvalidArgument("body", f"is not in gzip, as its content-encoding says: {error}") from None
            data = self._stream.unconsumed_tail or self._stream.unused_data
            if piece:
                yield piece

    def check_end(self) -> None:
        """Raise InvalidArgument unless all of it has come."""
        if not self._stream.eof:
            raise InvalidArgument("body", "ends before its gzip stream does")
