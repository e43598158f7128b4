"""The HTTP face: OpenAI-style completions and models, probes and metrics, over the core."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncGenerator, Coroutine, Mapping, Sequence
from contextlib import aclosing
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from twotower.errors import Overloaded, TwoTowerError, Unavailable
from twotower.events import Accepted, Block, Event, Finished
from twotower.gateway import openai_replies as replies
from twotower.gateway.bodies import Bodies
from twotower.gateway.brain import Brain
from twotower.gateway.core import Core, Prepared
from twotower.gateway.http_envelope import Envelope
from twotower.gateway.json_body import parse_json
from twotower.gateway.openai import MAX_QUOTE, CompletionCall, parse_completion
from twotower.gateway.openai_logprobs import ChoiceLogprobs
from twotower.status import status_of

log = logging.getLogger(__name__)

SSE_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}
RETRY_STATUSES = (429, 503)


def make_app(core: Core, bodies: Bodies, brain: Brain) -> ASGIApp:
    """The ASGI application."""

    async def healthz(request: Request) -> Response:
        return JSONResponse({"status": "alive"})

    async def readyz(request: Request) -> Response:
        reason = core.why_not_ready()
        if reason is None:
            return JSONResponse({"status": "ready"})
        return JSONResponse({"status": "not ready", "reason": reason}, status_code=503)

    async def metrics(request: Request) -> Response:
        return Response(generate_latest(core.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    async def pool(request: Request) -> Response:
        return JSONResponse(brain.body())

    async def models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [replies.model_body(core.model)]})

    async def model(request: Request) -> Response:
        _check_model(core, request.path_params["model"])
        return JSONResponse(replies.model_body(core.model))

    app = Starlette(
        routes=[
            Route("/v1/completions", Completions(core, bodies), methods=["POST"]),
            Route("/v1/models", models),
            Route("/v1/pool", pool),
            Route("/v1/models/{model:path}", model),
            Route("/healthz", healthz),
            Route("/readyz", readyz),
            Route("/health", readyz),  # as load testers call it
            Route("/metrics", metrics),
        ],
        exception_handlers={HTTPException: _on_http_error, TwoTowerError: _on_error, Exception: _on_error},
    )
    app.router.redirect_slashes = False
    return Envelope(app)


class ModelNotFoundError(HTTPException):
    """A name that is not served here."""


class Completions:
    """`POST /v1/completions` as a plain ASGI application, so that a client's leaving is noticed at any moment."""

    def __init__(self, core: Core, bodies: Bodies) -> None:
        self._core = core
        self._bodies = bodies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        arrived = asyncio.get_running_loop().time()
        try:
            async with self._bodies.read(Request(scope, receive)) as body:
                call = await self._parse(body)
                body.clear()
                await self._serve(call, arrived, scope, receive, send)
        except ClientDisconnect:
            return

    async def _parse(self, body: bytearray) -> CompletionCall:
        most = self._core.max_in_flight
        try:
            call = await self._core.read(len(body), lambda: parse_completion(parse_json(body), most))
            _check_model(self._core, call.model)
        except (TwoTowerError, ModelNotFoundError):
            self._core.metrics.requests.labels("unknown", "invalid").inc()
            raise
        return call

    async def _serve(self, call: CompletionCall, arrived: float, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def noting(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await _while_connected(receive, self._answer(call, arrived, scope, receive, noting))
        except asyncio.CancelledError:
            if not self._core.draining:
                raise
            error = Unavailable("this gateway is shutting down")  # and the drain's time is over
            if not started:
                raise error from None
            if call.stream:
                await _send_data(send, replies.error_body(error))
                await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _answer(self, call: CompletionCall, arrived: float, scope: Scope, receive: Receive, send: Send) -> None:
        deadline = None if call.timeout_s is None else arrived + call.timeout_s
        with self._core.admit(call.requests):
            prepared = await self._core.prepare(call.requests)
            reply = replies.CompletionReply(prepared[0].job.request_id, int(time.time()), self._core.model.name)
            async with aclosing(_merged([self._core.run(request, deadline) for request in prepared])) as events:
                if call.stream:
                    await self._stream(call, reply, prepared, events, send)
                else:
                    response = await self._whole(call, reply, prepared, events)
                    await response(scope, receive, send)

    async def _whole(
        self,
        call: CompletionCall,
        reply: replies.CompletionReply,
        prepared: Sequence[Prepared],
        events: AsyncGenerator[tuple[int, Event], None],
    ) -> Response:
        totals = replies.Totals()
        texts: list[list[str]] = [[] for _ in prepared]
        token_ids: list[list[int]] = [[] for _ in prepared]
        reasons = ["" for _ in prepared]
        logprobs = [ChoiceLogprobs(self._core.model, request) for request in prepared]
        async for index, event in events:
            if isinstance(event, Accepted):
                if index % call.n == 0:  # a prompt counts once, whatever its choices
                    totals.accept(event.prompt_tokens)
                continue
            texts[index].append(event.text)
            logprobs[index].push(event)
            if isinstance(event, Block):
                token_ids[index] += event.token_ids
            else:
                reasons[index] = event.finish_reason.value
                totals.finish(event)
        choices = [
            replies.choice(index, "".join(texts[index]), tuple(token_ids[index]), reasons[index], logprobs[index].release())
            for index in range(len(prepared))
        ]
        headers = {"x-request-id": prepared[0].job.request_id}
        return JSONResponse(reply.whole(choices, totals.body(), _warnings(prepared)), headers=headers)

    async def _stream(
        self,
        call: CompletionCall,
        reply: replies.CompletionReply,
        prepared: Sequence[Prepared],
        events: AsyncGenerator[tuple[int, Event], None],
        send: Send,
    ) -> None:
        """Server-sent events. The status waits for the first block, so that what fails before is a plain error."""
        totals, warnings, started = replies.Totals(), _warnings(prepared), False
        logprobs = [ChoiceLogprobs(self._core.model, request) for request in prepared]
        try:
            async for index, event in events:
                if isinstance(event, Accepted):
                    if index % call.n == 0:
                        totals.accept(event.prompt_tokens)
                    continue
                if isinstance(event, Finished):
                    totals.finish(event)
                logprobs[index].push(event)
                if not started:
                    await _send_head(send, prepared[0].job.request_id)
                item = replies.event_choice(index, event, logprobs[index].release())
                await _send_data(send, reply.chunk(item, call.include_usage, warnings))
                started, warnings = True, []
        except Exception as error:
            if not started:
                raise
            if not isinstance(error, TwoTowerError):
                log.exception("a stream failed")
            await _send_data(send, replies.error_body(error))
        else:
            if call.include_usage:
                await _send_data(send, reply.usage_chunk(totals.body()))
            await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _send_head(send: Send, request_id: str) -> None:
    headers = {"content-type": "text/event-stream; charset=utf-8", "x-request-id": request_id, **SSE_HEADERS}
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": 200, "headers": raw})


async def _send_data(send: Send, data: dict[str, Any]) -> None:
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    await send({"type": "http.response.body", "body": f"data: {text}\n\n".encode(), "more_body": True})


async def _merged(streams: Sequence[AsyncGenerator[Event, None]]) -> AsyncGenerator[tuple[int, Event], None]:
    """Events of several generations as they come, each with its stream's index; the first error ends all."""
    queue: asyncio.Queue[tuple[int, Event | Exception | None]] = asyncio.Queue(maxsize=len(streams))

    async def pump(index: int, stream: AsyncGenerator[Event, None]) -> None:
        try:
            async with aclosing(stream):
                async for event in stream:
                    await queue.put((index, event))
        except Exception as error:
            await queue.put((index, error))
        else:
            await queue.put((index, None))

    tasks = [asyncio.create_task(pump(index, stream)) for index, stream in enumerate(streams)]
    try:
        running = len(tasks)
        while running:
            index, item = await queue.get()
            if item is None:
                running -= 1
            elif isinstance(item, Exception):
                raise item
            else:
                yield index, item
    finally:
        await _cancel(*tasks)


async def _while_connected(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Run `work`, and cancel it as soon as the client is gone. The body must have been read."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    task, watcher = asyncio.create_task(work), asyncio.create_task(gone())
    try:
        await asyncio.wait((task, watcher), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            await task  # for its error
    finally:
        await _cancel(task, watcher)


async def _cancel(*tasks: asyncio.Task[None]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _warnings(prepared: Sequence[Prepared]) -> list[str]:
    return list(dict.fromkeys(warning for request in prepared for warning in request.warnings))


def _check_model(core: Core, name: str | None) -> None:
    if name is not None and name != core.model.name:
        raise ModelNotFoundError(404, f"the model {name[:MAX_QUOTE]!r} does not exist; this server has {core.model.name!r}")


async def _on_error(request: Request, error: Exception) -> Response:
    status = status_of(error).http
    headers = {"retry-after": str(Overloaded.retry_after_s)} if status in RETRY_STATUSES else None
    return _error_response(replies.error_body(error), status, headers)


async def _on_http_error(request: Request, error: Exception) -> Response:
    """What the routes refuse: paths, methods, bodies, models."""
    assert isinstance(error, HTTPException)
    is_model = isinstance(error, ModelNotFoundError)
    code, param, message = None, None, error.detail
    if is_model:
        code, param = "model_not_found", "model"
    elif error.status_code == 404:
        message = f"there is no {request.url.path[:MAX_QUOTE]} here"
    elif error.status_code == 405:
        message = f"{request.url.path[:MAX_QUOTE]} does not take {request.method}"
    body = replies.plain_error(message, "invalid_request_error", param, code)
    return _error_response(body, error.status_code, error.headers)


def _error_response(body: dict[str, Any], status: int, headers: Mapping[str, str] | None) -> Response:
    """In ASCII, as the body may quote the client's own text, which need not be valid Unicode."""
    return Response(json.dumps(body), status_code=status, headers=headers, media_type="application/json")
