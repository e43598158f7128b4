"""How a request is sent, over each of the two faces, and how its end is told."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import aclosing
from typing import Any

import httpx

from tests.faults.asks import Answer, Ask
from twotower.client.grpc_client import GatewayClient
from twotower.errors import Overloaded, TwoTowerError, Unavailable
from twotower.events import Block, Finished
from twotower.request import Mode

REFUSALS = (429, 503)
REFUSAL_TYPES = ("rate_limit_error", "service_unavailable")
"""HTTP statuses, and types of errors, of a refusal that a client is told to try again after."""


class Refused(Exception):
    """Nothing was begun; the reply says to try again later, as the README documents."""


class Failed(Exception):
    """The request ended in any other way than with its answer."""


class Clients:
    """One client of each face of a gateway. Leaving a request is cancelling it."""

    def __init__(self, grpc: str, http: str) -> None:
        self._grpc = GatewayClient(grpc)
        self._http = httpx.AsyncClient(
            base_url=f"http://{http}", timeout=None, limits=httpx.Limits(max_keepalive_connections=8)
        )

    async def close(self) -> None:
        """Close both."""
        await self._grpc.close()
        await self._http.aclose()

    async def ask(self, ask: Ask, face: str) -> Answer:
        """Send it over a face: grpc, http, or sse (HTTP, streamed). Raises Refused, Failed."""
        try:
            match face:
                case "grpc":
                    return await self._over_grpc(ask)
                case "sse":
                    return await self._streamed(ask)
            return await self._at_once(ask)
        except httpx.HTTPError as error:
            raise Failed(f"{face}: connection: {type(error).__name__}") from None

    async def watched(self, ask: Ask, began: Callable[[], None]) -> None:
        """Send it over gRPC, and say when its first block has come. Raises Refused, Failed."""
        await self._over_grpc(ask, began)

    async def _over_grpc(self, ask: Ask, began: Callable[[], None] = lambda: None) -> Answer:
        settings = dict(ask.settings)
        mode = Mode(settings.pop("mode", Mode.DIFFUSION.value))
        tokens: list[int] = []
        text, finished, blocks = "", False, 0
        try:
            async with aclosing(self._grpc.generate(ask.prompt, mode=mode, **settings)) as events:
                async for event in events:
                    if isinstance(event, Block):
                        if event.index != blocks:
                            raise Failed(f"grpc: block {event.index} came where {blocks} was due")
                        if not blocks:
                            began()
                        blocks += 1
                        tokens += event.token_ids
                        text += event.text
                    elif isinstance(event, Finished):
                        finished = True
                        text += event.text
        except (Overloaded, Unavailable) as error:
            if not blocks:
                raise Refused(f"grpc: {type(error).__name__}: {error}") from None
            raise Failed(f"grpc, after the first block: {type(error).__name__}: {error}") from None
        except TwoTowerError as error:
            raise Failed(f"grpc: {type(error).__name__}: {error}") from None
        if not finished:
            raise Failed("grpc: the stream ended without Finished")
        return Answer(tuple(tokens), text)

    async def _at_once(self, ask: Ask) -> Answer:
        reply = await self._http.post("/v1/completions", json=_body(ask, stream=False))
        _check(reply.status_code, "http", reply)
        choice = reply.json()["choices"][0]
        return Answer(tuple(choice["token_ids"]), choice["text"])

    async def _streamed(self, ask: Ask) -> Answer:
        tokens: list[int] = []
        text, done = "", False
        async with self._http.stream("POST", "/v1/completions", json=_body(ask, stream=True)) as reply:
            if reply.status_code != 200:
                await reply.aread()
            _check(reply.status_code, "sse", reply)
            async for line in reply.aiter_lines():
                if not line.startswith("data: "):
                    continue
                if line == "data: [DONE]":
                    done = True
                    continue
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    error = event["error"]
                    kind = (
                        Refused if not tokens and error.get("type") in ("service_unavailable", "rate_limit_error") else Failed
                    )
                    when = "" if kind is Refused else ", in the stream"
                    raise kind(f"sse{when}: {error.get('type')}: {error.get('message')}")
                choice = event["choices"][0]
                tokens += choice["token_ids"]
                text += choice["text"]
        if not done:
            raise Failed("sse: the stream ended without [DONE]")
        return Answer(tuple(tokens), text)


def _body(ask: Ask, *, stream: bool) -> dict[str, Any]:
    return {"prompt": ask.prompt, "stream": stream, **ask.settings}


def _check(status: int, face: str, reply: httpx.Response) -> None:
    if status == 200:
        return
    error = reply.json()["error"]
    reason = f"{face}: {status}: {error.get('message')}"
    raise Refused(reason) if status in REFUSALS else Failed(reason)
