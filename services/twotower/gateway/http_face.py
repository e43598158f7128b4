"""The HTTP face: OpenAI's endpoints and ours, probes and metrics, over the core."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from twotower import __version__
from twotower.errors import Overloaded, TwoTowerError
from twotower.gateway import openai_replies as replies
from twotower.gateway.bodies import Bodies
from twotower.gateway.brain import Brain
from twotower.gateway.core import Core
from twotower.gateway.http_envelope import REQUEST_ID, TIMING, Envelope
from twotower.gateway.http_generate import Generate, ModelNotFoundError, check_model
from twotower.gateway.http_text import TextEndpoints
from twotower.gateway.openai import parse_completion
from twotower.gateway.openai_chat import parse_chat
from twotower.gateway.openai_fields import MAX_QUOTE
from twotower.gateway.openapi import document
from twotower.gateway.scoring import Scorer
from twotower.status import status_of

RETRY_STATUSES = (429, 503)

CORS_MAX_AGE_S = 600


def make_app(core: Core, bodies: Bodies, brain: Brain, scorer: Scorer, cors_origins: Sequence[str] = ()) -> ASGIApp:
    """The ASGI application. `cors_origins`: web pages of which origins may use it from a browser; "*": all."""

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
        check_model(core, request.path_params["model"])
        return JSONResponse(replies.model_body(core.model))

    async def version(request: Request) -> Response:
        return JSONResponse({"version": __version__})

    async def openapi(request: Request) -> Response:
        return JSONResponse(published)

    async def responses(request: Request) -> Response:
        problem = "the Responses API is not supported; use /v1/chat/completions or /v1/completions"
        return _error_response(replies.plain_error(problem, "invalid_request_error", code="unsupported_endpoint"), 400, None)

    published, most = document(), core.max_in_flight
    completions = Generate(core, bodies, scorer, lambda body: parse_completion(body, most), replies.CompletionReply)
    chats = Generate(core, bodies, scorer, lambda body: parse_chat(body, core.model, most), replies.ChatReply, "messages")
    text = TextEndpoints(core, bodies)
    app = Starlette(
        routes=[
            Route("/v1/completions", completions, methods=["POST"]),
            Route("/v1/chat/completions", chats, methods=["POST"]),
            Route("/v1/responses", responses, methods=["GET", "POST", "DELETE"]),
            Route("/v1/responses/{rest:path}", responses, methods=["GET", "POST", "DELETE"]),
            Route("/v1/models", models),
            Route("/v1/pool", pool),
            Route("/v1/models/{model:path}", model),
            Route("/tokenize", text.tokenize, methods=["POST"]),
            Route("/detokenize", text.detokenize, methods=["POST"]),
            Route("/version", version),
            Route("/openapi.json", openapi),
            Route("/healthz", healthz),
            Route("/readyz", readyz),
            Route("/health", readyz),  # as load testers call it
            Route("/metrics", metrics),
        ],
        exception_handlers={HTTPException: _on_http_error, TwoTowerError: _on_error, Exception: _on_error},
    )
    app.router.redirect_slashes = False
    return Envelope(_with_cors(app, cors_origins) if cors_origins else app)


def _with_cors(app: ASGIApp, origins: Sequence[str]) -> ASGIApp:
    return CORSMiddleware(
        app,
        allow_origins=list(origins),
        allow_methods=["GET", "POST"],
        allow_headers=["*"],
        expose_headers=[REQUEST_ID.decode(), TIMING.decode(), "retry-after"],
        max_age=CORS_MAX_AGE_S,
    )


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
