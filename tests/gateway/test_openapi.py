"""The published document, and the server held to it by schemathesis: no 500, no status or reply that it does not name."""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import Case, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.support.gateways import gateway
from tests.support.scripted_context import ScriptedContext
from twotower.gateway import openai, openai_chat, openapi_schemas
from twotower.gateway.openapi import document

from .test_chat import chatty  # noqa: F401  # a fixture
from .test_failures import SCRIPT

CHECKS = [
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]


class InThread:
    """An asynchronous context in an event loop of its own, for callers that are not asynchronous."""

    def __init__(self, enter: Callable[[], Any]) -> None:
        self._enter = enter
        self._started = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))
        self.value: Any = None

    async def _run(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        try:
            async with self._enter() as self.value:
                self._started.set()
                await self._stop.wait()
        finally:
            self._started.set()

    def __enter__(self) -> Any:
        self._thread.start()
        self._started.wait(30)
        assert self.value is not None
        return self.value

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(30)


@pytest.fixture(scope="module")
def base(chatty: Path) -> Iterator[str]:  # noqa: F811
    @asynccontextmanager
    async def serve() -> AsyncIterator[str]:
        async with gateway(chatty, ScriptedContext(SCRIPT)) as running:
            yield running.http

    with InThread(serve) as url:
        yield url


@pytest.fixture(scope="module")
def api(base: str) -> Any:
    published = httpx.get(f"{base}/openapi.json", trust_env=False).json()
    assert published == document()
    schema = schemathesis.openapi.from_dict(published)
    schema.config.base_url = base
    return schema


OPERATIONS = [
    (path, method) for path, operations in document()["paths"].items() for method in ("get", "post") if method in operations
]


@pytest.mark.parametrize(("path", "method"), OPERATIONS)
@pytest.mark.parametrize("mode", list(GenerationMode))
def test_the_server_keeps_to_its_document(api: Any, path: str, method: str, mode: GenerationMode) -> None:
    """Requests as the document has them, and such as it does not."""
    operation = api[path][method.upper()]
    if mode is GenerationMode.NEGATIVE and not operation.body:
        return  # there is nothing to get wrong
    examples = 40 if method == "post" else 3

    @settings(max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(case=operation.as_strategy(generation_mode=mode))
    def check(case: Case[Any]) -> None:
        response = case.call()
        case.validate_response(response, checks=CHECKS if _ran_out(case, response) else [*CHECKS, not_a_server_error])
        if mode is GenerationMode.NEGATIVE:
            assert 400 <= response.status_code < 500

    check()


def _ran_out(case: Case[Any], response: Any) -> bool:
    """Whether the answer is that the time is over which the request itself allows."""
    allowed = isinstance(case.body, dict) and case.body.get("timeout_s")
    return response.status_code == 504 and bool(allowed)


def test_every_field_that_is_taken_is_published() -> None:
    schemas = openapi_schemas.SCHEMAS
    assert set(schemas["CompletionRequest"]["properties"]) == openai.KNOWN | set(openai.COMPLETION_NEUTRAL)
    assert set(schemas["ChatRequest"]["properties"]) == openai_chat.KNOWN | set(openai_chat.CHAT_NEUTRAL)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "x"}),
        ("/v1/completions", {"prompt": ["x", "y"], "n": 2, "logprobs": 0, "details": True, "block_size": 8}),
        ("/v1/completions", {"prompt": [5, 6], "echo": True, "max_tokens": 0}),
        ("/v1/completions", {"prompt": "the fox", "echo": True, "max_tokens": 1, "logprobs": 2}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "logprobs": True, "details": True}),
        ("/tokenize", {"prompt": "x", "return_token_strs": True}),
        ("/detokenize", {"tokens": [5, 6]}),
    ],
)
def test_replies_with_everything_in_them(api: Any, base: str, path: str, body: Any) -> None:
    """What random requests seldom are: right."""
    case = api[path]["POST"].Case(body=body, media_type="application/json")
    response = case.call()
    assert response.status_code == 200, response.text
    case.validate_response(response, checks=CHECKS)


CURL = re.compile(r"curl http://127\.0\.0\.1:8000(\S+) .*?-d '(\{.*?\})'", re.DOTALL)


def test_the_commands_of_the_documentation(base: str) -> None:
    root = Path(__file__).parents[2]
    commands = [found for name in ("README.md", "docs/http.md") for found in CURL.findall((root / name).read_text())]
    assert len(commands) >= 5
    for path, body in commands:
        answer = httpx.post(base + path, content=body, headers={"content-type": "application/json"}, trust_env=False)
        assert answer.status_code == 200, (path, body, answer.text)
