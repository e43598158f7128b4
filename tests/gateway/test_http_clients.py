"""What real HTTP clients do besides asking: ids of requests, old versions, offers to upgrade, fields that ask for nothing."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.gateways import RunningGateway, gateway
from tests.support.scripted_context import ScriptedContext

from .test_failures import SCRIPT
from .test_http_face import client_of, http
from .test_slow_clients import ask, connection, rest

BODY = {"prompt": [5], "max_tokens": 8}


@pytest.fixture
async def running(checkpoint: Path) -> AsyncIterator[RunningGateway]:
    async with gateway(checkpoint, ScriptedContext(SCRIPT)) as started:
        yield started


async def test_a_requests_id_is_taken_and_returned(checkpoint: Path) -> None:
    async with http(checkpoint, ScriptedContext(SCRIPT)) as client:
        asked: list[tuple[str, str, dict[str, Any]]] = [
            ("POST", "/v1/completions", {"json": BODY}),
            ("POST", "/v1/completions", {"json": {**BODY, "stream": True}}),
            ("POST", "/v1/completions", {"json": {**BODY, "gamma": 7}}),
            ("POST", "/v1/completions", {"content": b"{"}),
            ("POST", "/v1/completions", {"json": {**BODY, "model": "another"}}),
            ("GET", "/nowhere", {}),
            ("GET", "/v1/models", {}),
        ]
        for method, path, options in asked:
            answer = await client.request(method, path, headers={"x-request-id": "mine-7"}, **options)
            assert answer.headers.get_list("x-request-id") == ["mine-7"]
            ids = [(await client.request(method, path, **options)).headers.get_list("x-request-id") for _ in range(2)]
            assert all(len(given) == 1 and given[0] for given in ids)
            assert ids[0] != ids[1]
        for bad in ("x" * 129, "a b", "ü"):
            answer = await client.get("/healthz", headers={"x-request-id": bad.encode()})  # type: ignore[arg-type]
            assert answer.headers["x-request-id"] != bad


async def test_health_is_readiness(checkpoint: Path) -> None:
    async with gateway(checkpoint, ScriptedContext(SCRIPT)) as running, client_of(running) as client:
        assert (await client.get("/health")).json() == (await client.get("/readyz")).json() == {"status": "ready"}


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_of_http_1_0_gets_no_chunks(running: RunningGateway, stream: bool) -> None:
    body = json.dumps({**BODY, "stream": stream}).encode()
    async with connection(running) as (reader, writer):
        writer.write(b"POST /v1/completions HTTP/1.0\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
        head, _, answer = (await rest(reader)).partition(b"\r\n\r\n")
    assert b" 200 " in head.splitlines()[0]
    assert b"transfer-encoding" not in head
    assert b"content-length: %d" % len(answer) in head
    if stream:
        assert answer.startswith(b"data: {")
        assert answer.endswith(b"data: [DONE]\n\n")
    else:
        assert json.loads(answer)["choices"][0]["token_ids"] == SCRIPT[:8]


@pytest.mark.parametrize("offer", [b"Upgrade: h2c", b"upgrade: h2c", b"Upgrade: websocket"])
@pytest.mark.parametrize("apart", [False, True])
async def test_an_upgrade_that_is_not_taken_keeps_the_body(running: RunningGateway, offer: bytes, apart: bool) -> None:
    body = json.dumps({**BODY, "user": "\\nupgrade: "}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: Upgrade, HTTP2-Settings\r\n"
    async with connection(running) as (reader, writer):
        writer.write(head + offer + b"\r\nhttp2-settings: AAEAAEAAAAIAAAABAAMAAABkAAQBAAAAAAUAAEAA\r\n")
        writer.write(b"content-length: %d\r\n\r\n" % len(body))
        if apart:
            await writer.drain()
        writer.write(body)
        answer = await reader.readuntil(b"\r\n\r\n")
    assert b" 200 " in answer.splitlines()[0]


async def test_a_compressed_body_is_refused_by_name(running: RunningGateway) -> None:
    async with client_of(running) as client:
        for coding, status in (("gzip", 415), ("br", 415), ("identity", 200)):
            answer = await client.post("/v1/completions", content=json.dumps(BODY), headers={"content-encoding": coding})
            assert answer.status_code == status
            assert status == 200 or f"content-encoding: '{coding}'" in answer.json()["error"]["message"]


async def test_fields_that_ask_for_nothing_are_taken(running: RunningGateway) -> None:
    neutral = {
        "min_tokens": 0,
        "repetition_penalty": 1.0,
        "response_format": {"type": "text"},
        "prompt_logprobs": None,
        "store": False,
        "metadata": {"a": "b"},
        "stream_options": {},
        "best_of": 1,
        "presence_penalty": 0,
    }
    meaning = {
        "min_tokens": 1,
        "repetition_penalty": 1.1,
        "response_format": {"type": "json_object"},
        "prompt_logprobs": 1,
        "store": True,
        "stream_options": {"include_usage": True},
    }
    async with client_of(running) as client:
        assert (await client.post("/v1/completions", json={**BODY, **neutral})).status_code == 200
        assert (await client.post("/v1/completions", json={**BODY, **dict.fromkeys(neutral)})).status_code == 200
        for name, value in meaning.items():
            answer = await client.post("/v1/completions", json={**BODY, name: value})
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, name)


async def test_max_tokens_has_two_names(running: RunningGateway) -> None:
    async with client_of(running) as client:
        for given, count in (
            ({"max_completion_tokens": 5}, 5),
            ({"max_completion_tokens": 5, "max_tokens": 5}, 5),
            ({"max_completion_tokens": None, "max_tokens": 6}, 6),
        ):
            answer = await client.post("/v1/completions", json={"prompt": [5], **given})
            assert answer.json()["usage"]["completion_tokens"] == count
        answer = await client.post("/v1/completions", json={"prompt": [5], "max_tokens": 4, "max_completion_tokens": 5})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "max_completion_tokens")


async def test_an_unknown_model_is_counted_and_not_echoed_at_length(running: RunningGateway) -> None:
    async with client_of(running) as client:
        answer = await client.post("/v1/completions", json={**BODY, "model": "x" * 100_000})
        assert answer.status_code == 404
        assert len(answer.content) < 1000
        assert 'requests_total{mode="unknown",outcome="invalid"} 1.0' in (await client.get("/metrics")).text
    status, _ = await ask(running)
    assert status == 200
