"""The HTTP face as an OpenAPI document, which `GET /openapi.json` publishes. The tests hold the server to it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from twotower import __version__
from twotower.gateway.openapi_schemas import SCHEMAS, ref

Json = dict[str, Any]

REFUSALS = {
    400: "The request is wrong; `error.param` names the field.",
    404: "The model is not served here.",
    408: "The body came too slowly.",
    413: "The body is too large.",
    415: "The body is compressed in a way that is not supported.",
    429: "Too much is in flight; `Retry-After` says when to come back.",
    500: "The request failed.",
    503: "It cannot be served now; `Retry-After` says when to come back.",
    504: "The call's `timeout_s` has passed.",
}
BODY_REFUSALS = (400, 404, 408, 413, 415, 429, 500, 503)
"""Of an endpoint that takes a body."""
GENERATION_REFUSALS = (*BODY_REFUSALS, 504)

HEADERS = {
    "X-Request-Id": {"description": "The request's own, or a new one.", "schema": {"type": "string"}},
    "Server-Timing": {"description": "Milliseconds since the request's arrival.", "schema": {"type": "string"}},
}


def document() -> Json:
    """The document, as JSON's types."""
    stream = "With `stream: true`: server-sent events, each a piece of the reply, then `[DONE]`."
    generation = {"text/event-stream": {"schema": {"type": "string", "description": stream}}}
    model_name = {"name": "model", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "twotower",
            "version": __version__,
            "summary": "Two-tower diffusion language models over HTTP, in the form of OpenAI's API.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": {
            "/v1/completions": _post(
                "createCompletion",
                "Continue one or several prompts.",
                "CompletionRequest",
                "Completion",
                GENERATION_REFUSALS,
                generation,
            ),
            "/v1/chat/completions": _post(
                "createChatCompletion",
                "Answer messages, where the checkpoint brings a chat template.",
                "ChatRequest",
                "ChatCompletion",
                GENERATION_REFUSALS,
                generation,
            ),
            "/v1/responses": {
                "post": {
                    "operationId": "createResponse",
                    "summary": "Not supported, and refused as such.",
                    "responses": {"400": _response("Not supported.", "Error")},
                }
            },
            "/v1/models": _get("listModels", "What is served.", "Models"),
            "/v1/models/{model}": {
                "parameters": [model_name],
                **_get("retrieveModel", "One model, and its limits.", "Model", (404,)),
            },
            "/tokenize": _post("tokenize", "Text or messages as token ids.", "TokenizeRequest", "Tokens", BODY_REFUSALS),
            "/detokenize": _post("detokenize", "Token ids as text.", "DetokenizeRequest", "Text", BODY_REFUSALS),
            "/version": _get("getVersion", "The server's version.", "Version"),
            "/openapi.json": _get("getOpenapi", "This document.", "Document"),
            "/healthz": _get("getAlive", "Whether the process lives.", "Health"),
            "/readyz": _health("getReady"),
            "/health": _health("getHealth"),
            "/metrics": {
                "get": {
                    "operationId": "getMetrics",
                    "summary": "Prometheus metrics.",
                    "responses": {
                        "200": {
                            "description": "Prometheus' text format.",
                            "headers": HEADERS,
                            "content": {"text/plain": {"schema": {"type": "string"}}},
                        }
                    },
                }
            },
        },
        "components": {"schemas": SCHEMAS},
    }


def _post(
    operation: str, summary: str, request: str, reply: str, refusals: tuple[int, ...], also: Mapping[str, Any] | None = None
) -> Json:
    answers = _response("Done.", reply)
    answers["content"] |= also or {}
    return {
        "post": {
            "operationId": operation,
            "summary": summary,
            "requestBody": {"required": True, "content": {"application/json": {"schema": ref(request)}}},
            "responses": {"200": answers, **_refusals(refusals)},
        }
    }


def _get(operation: str, summary: str, reply: str, refusals: tuple[int, ...] = ()) -> Json:
    responses = {"200": _response("Done.", reply), **_refusals(refusals)}
    return {"get": {"operationId": operation, "summary": summary, "responses": responses}}


def _health(operation: str) -> Json:
    get = _get(operation, "Whether requests will succeed.", "Health")
    get["get"]["responses"]["503"] = _response("They would fail, for the reason given.", "Health")
    return get


def _refusals(codes: tuple[int, ...]) -> Json:
    return {str(code): _response(REFUSALS[code], "Error") for code in codes}


def _response(description: str, schema: str) -> Json:
    return {
        "description": description,
        "headers": HEADERS,
        "content": {"application/json": {"schema": ref(schema)}},
    }
