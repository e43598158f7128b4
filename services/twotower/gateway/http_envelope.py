"""What every HTTP answer has in common: a request's id, how long it took, a form that its client's version of HTTP knows."""

from __future__ import annotations

import re
import time
import uuid

from starlette.types import ASGIApp, Message, Receive, Scope, Send

REQUEST_ID = b"x-request-id"
TIMING = b"server-timing"
_VALID_ID = re.compile(rb"[!-~]{1,128}")


class Envelope:
    """An ASGI application around another."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request: with the id it came with, or one of its own."""
        given = next((value for name, value in scope["headers"] if name == REQUEST_ID and _VALID_ID.fullmatch(value)), None)
        arrived = time.monotonic()

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = {name: value for name, value in message["headers"] if name in (REQUEST_ID, TIMING)}
                request_id = given or headers.get(REQUEST_ID) or uuid.uuid4().hex.encode()
                timing = headers.get(TIMING) or b"total;dur=%.1f" % (1000 * (time.monotonic() - arrived))
                others = [(name, value) for name, value in message["headers"] if name not in headers]
                message = {**message, "headers": [*others, (REQUEST_ID, request_id), (TIMING, timing)]}
            await send(message)

        await self._app(scope, receive, _Whole(sending) if scope["http_version"] == "1.0" else sending)


class _Whole:
    """For a client that does not know chunks: an answer is sent when it is complete, with its length."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._start: Message = {}
        self._body = bytearray()

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._start = message
            return
        self._body += message.get("body", b"")
        if message.get("more_body", False):
            return
        headers = [(name, value) for name, value in self._start["headers"] if name != b"content-length"]
        length = (b"content-length", str(len(self._body)).encode())
        await self._send({**self._start, "headers": [*headers, length]})
        await self._send({"type": "http.response.body", "body": bytes(self._body), "more_body": False})
