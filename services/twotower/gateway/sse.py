"""Server-sent events over ASGI."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from starlette.types import Send

HEADERS = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache", "x-accel-buffering": "no"}
DONE = b"data: [DONE]\n\n"


async def begin(send: Send, headers: Mapping[str, str]) -> None:
    """Send the head of a stream."""
    raw = [(name.encode(), value.encode()) for name, value in {**HEADERS, **headers}.items()]
    await send({"type": "http.response.start", "status": 200, "headers": raw})


async def event(send: Send, data: Mapping[str, Any], kind: str | None = None) -> None:
    """Send an event; `kind`: its type, if it has one of its own."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    body = f"data: {text}\n\n" if kind is None else f"event: {kind}\ndata: {text}\n\n"
    await send({"type": "http.response.body", "body": body.encode(), "more_body": True})


async def done(send: Send) -> None:
    """Say, as OpenAI does, that the stream is whole."""
    await send({"type": "http.response.body", "body": DONE, "more_body": True})


async def end(send: Send) -> None:
    """End the stream."""
    await send({"type": "http.response.body", "body": b"", "more_body": False})
