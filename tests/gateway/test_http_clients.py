"""What real HTTP clients do besides asking: ids of requests, old versions, offers to upgrade, fields that ask for nothing."""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

import twotower
from tests.support.gateways import RunningGateway, gateway
from tests.support.scripted_context import ScriptedContext
from tests.support.tokenizers import VOCAB_SIZE
from twotower.gateway.openai_fields import MODES
from twotower.text.tokenizer import Tokenizer

from .conftest import BLOCK, MAX_CONTEXT
from .test_failures import SCRIPT, hang_at
from .test_http_face import client_of, events_of, http
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


async def test_a_body_in_gzip_is_taken_and_others_are_refused_by_name(running: RunningGateway) -> None:
    plain = json.dumps(BODY).encode()
    zipped = gzip.compress(plain)
    cases = [
        ("gzip", zipped, 200, ""),
        ("GZIP", zipped, 200, ""),
        ("identity", plain, 200, ""),
        ("br", plain, 415, "content-encoding: 'br'"),
        ("gzip, gzip", zipped, 415, "content-encoding"),
        ("gzip", plain, 400, "body: is not in gzip"),
        ("gzip", zipped[:-9], 400, "body: ends before its gzip stream does"),
        ("gzip", zipped + b"more", 400, "body: holds more behind the end"),
        ("gzip", b"", 400, "body: ends before"),
    ]
    async with client_of(running) as client:
        for coding, content, status, message in cases:
            answer = await client.post("/v1/completions", content=content, headers={"content-encoding": coding})
            assert answer.status_code == status, (coding, content)
            assert status == 200 or message in answer.json()["error"]["message"]


async def test_a_body_in_gzip_is_as_large_as_what_it_becomes(checkpoint: Path) -> None:
    """A gigabyte of zeros in a megabyte is refused once it is larger than a body may be, and holds nothing then."""
    bomb = gzip.compress(bytes(1 << 26))
    async with http(checkpoint, ScriptedContext(SCRIPT), max_body_bytes=100_000) as client:
        for content in (bomb, gzip.compress(b" " * 100_001)):
            answer = await client.post("/v1/completions", content=content, headers={"content-encoding": "gzip"})
            assert (answer.status_code, "larger than 100000 bytes" in answer.text) == (413, True)
        fits = gzip.compress(json.dumps(BODY).encode().ljust(100_000))
        answer = await client.post("/v1/completions", content=fits, headers={"content-encoding": "gzip"})
        assert answer.status_code == 200


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


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (b'{"prompt": "a\xff"}', "prompt"),
        (b'{"prompt": "a", "stop": ["b", "\xe6\x97"]}', "stop"),
        (b'{"prompt": "a", "metadata": {"k": ["\xff"]}}', "metadata"),
        (b'{"prompt": "\xff', "body"),
        (b'["\xff"]', "body"),
        (b'{"\xff": 1}', "body"),
    ],
)
async def test_bytes_that_are_no_utf_8_are_named_by_field(running: RunningGateway, body: bytes, field: str) -> None:
    async with client_of(running) as client:
        answer = await client.post("/v1/completions", content=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, field)
    assert answer.json()["error"]["message"].startswith(f"{field}: is not valid UTF-8: ")


async def test_no_error_echoes_much_of_what_was_sent(running: RunningGateway) -> None:
    long = "x" * 500_000
    bodies: list[Any] = [
        {"model": long},
        {long: 1},
        {"mode": long},
        {"service_tier": long},
        {"suffix": long},
        {"seed": int("9" * 400)},
        {"prompt": [int("9" * 400)]},
        {"stop": long},
        {"stop": [long] * 2},
        {"stream": True, "stream_options": {long: True}},
        {"logit_bias": {long: 1}},
        {"n": long},
        {"max_tokens": [long]},
    ]
    async with client_of(running) as client:
        for fields in bodies:
            answer = await client.post("/v1/completions", json={**BODY, **fields})
            assert answer.status_code in (400, 404)
            assert len(answer.content) < 1500, list(fields)
        answer = await client.get("/" + "y" * 30_000)
        assert (answer.status_code, len(answer.content) < 500) == (404, True)


async def test_every_answer_says_how_long_it_took(running: RunningGateway) -> None:
    async with client_of(running) as client:
        for method, path, body, parts in (
            ("POST", "/v1/completions", BODY, ["read", "first-block", "total"]),
            ("POST", "/v1/completions", {**BODY, "stream": True}, ["read", "first-block", "total"]),
            ("POST", "/v1/completions", {**BODY, "gamma": 7}, ["total"]),
            ("GET", "/healthz", None, ["total"]),
            ("GET", "/nowhere", None, ["total"]),
        ):
            answer = await client.request(method, path, json=body)
            (header,) = answer.headers.get_list("server-timing")
            named = [part.split(";dur=") for part in header.split(", ")]
            assert [name for name, _ in named] == parts
            assert [float(ms) for _, ms in named] == sorted(float(ms) for _, ms in named)


async def test_pages_of_other_origins_ask_first(checkpoint: Path) -> None:
    preflight = {"origin": "https://a.example", "access-control-request-method": "POST"}
    preflight["access-control-request-headers"] = "authorization, content-type, x-stainless-lang"
    async with http(checkpoint, ScriptedContext(SCRIPT)) as client:  # unless it is asked for, nothing
        answer = await client.options("/v1/completions", headers=preflight)
        assert answer.status_code == 405
        assert not [name for name in answer.headers if name.startswith("access-control")]
    async with http(checkpoint, ScriptedContext(SCRIPT), cors_origins=("https://a.example",)) as client:
        answer = await client.options("/v1/completions", headers=preflight)
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == "https://a.example"
        assert "POST" in answer.headers["access-control-allow-methods"]
        assert "x-stainless-lang" in answer.headers["access-control-allow-headers"]
        assert answer.headers["x-request-id"]
        other = await client.options("/v1/completions", headers={**preflight, "origin": "https://b.example"})
        assert (other.status_code, "access-control-allow-origin" in other.headers) == (400, False)
        for fields in ({}, {"gamma": 7}, {"stream": True}):
            answer = await client.post("/v1/completions", json={**BODY, **fields}, headers={"origin": "https://a.example"})
            assert answer.headers["access-control-allow-origin"] == "https://a.example"
            assert "x-request-id" in answer.headers["access-control-expose-headers"]
    async with http(checkpoint, ScriptedContext(SCRIPT), cors_origins=("*",)) as client:
        assert (await client.options("/v1/models", headers=preflight)).headers["access-control-allow-origin"] == "*"


@pytest.mark.parametrize("usage", [True, False])
async def test_usage_as_it_grows(running: RunningGateway, usage: bool) -> None:
    options = {"continuous_usage_stats": True, "include_usage": usage}
    async with client_of(running) as client:
        answer = await client.post("/v1/completions", json={**BODY, "stream": True, "stream_options": options})
    *chunks, done = events_of(answer.text)
    assert done == "[DONE]"
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [4, 8, 8] + [8] * usage
    assert [chunk["usage"]["blocks"] for chunk in chunks] == [1, 2, 2] + [2] * usage
    assert all(chunk["usage"]["prompt_tokens"] == 1 for chunk in chunks)
    assert (chunks[-1]["choices"] == []) == usage


async def test_what_people_look_for(running: RunningGateway) -> None:
    async with client_of(running) as client:
        (model,) = (await client.get("/v1/models")).json()["data"]
        assert model == (await client.get("/v1/models/tiny")).json()
        assert (model["max_context"], model["max_model_len"], model["block_size"]) == (MAX_CONTEXT, MAX_CONTEXT, BLOCK)
        assert model["modes"] == list(MODES)
        assert {"diffusion", "ar"} <= set(MODES)
        assert (model["has_tokenizer"], model["has_chat_template"]) == (True, False)
        assert (await client.get("/version")).json() == {"version": twotower.__version__}
        for method, path in (("POST", "/v1/responses"), ("GET", "/v1/responses/resp_1"), ("DELETE", "/v1/responses/x")):
            answer = await client.request(method, path)
            assert answer.status_code == 400
            assert "the Responses API is not supported; use /v1/chat/completions" in answer.json()["error"]["message"]


async def test_tokenize_and_detokenize(checkpoint: Path, bare_checkpoint: Path, tokenizer: Tokenizer) -> None:
    text = "the quick 日本語 🙂"
    ids = tokenizer.encode(text)
    async with http(checkpoint, ScriptedContext(SCRIPT)) as client:
        answer = (await client.post("/tokenize", json={"prompt": text, "model": "tiny"})).json()
        assert answer == {"count": len(ids), "max_model_len": MAX_CONTEXT, "tokens": ids, "token_strs": None}
        named = (await client.post("/tokenize", json={"prompt": text, "return_token_strs": True})).json()
        assert named["token_strs"] == [tokenizer.name(i) for i in ids]
        assert (await client.post("/detokenize", json={"tokens": ids})).json() == {"prompt": text}
        for path, body, field in (
            ("/tokenize", {}, "prompt"),
            ("/tokenize", {"prompt": "a\ud800"}, "prompt"),
            ("/tokenize", {"prompt": "x " * 5000}, "prompt"),
            ("/tokenize", {"messages": [{"role": "user", "content": "x"}]}, "messages"),
            ("/tokenize", {"prompt": "x", "messages": []}, "prompt"),
            ("/tokenize", {"prompt": "x", "truncate": 1}, "truncate"),
            ("/detokenize", {}, "tokens"),
            ("/detokenize", {"tokens": ["a"]}, "tokens"),
            ("/detokenize", {"tokens": [VOCAB_SIZE]}, "tokens"),
            ("/detokenize", {"tokens": [5] * (MAX_CONTEXT + 1)}, "tokens"),
        ):
            refused = await client.post(path, content=json.dumps(body))
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, field), body
        for path in ("/tokenize", "/detokenize"):
            assert (await client.post(path, json={"prompt": "x", "tokens": [5], "model": "no"})).status_code in (400, 404)
    async with http(bare_checkpoint, ScriptedContext(SCRIPT)) as client:
        for path, body in (("/tokenize", {"prompt": "x"}), ("/detokenize", {"tokens": [5]})):
            assert "has no tokenizer" in (await client.post(path, json=body)).json()["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("stop", ["fox", "own fox", "日", "brown", "the", "o"])
async def test_what_is_told_agrees_with_the_text(checkpoint: Path, tokenizer: Tokenizer, stop: str, stream: bool) -> None:
    """Token ids, usage and logprobs end where a stop string cuts the text, though blocks go on behind it."""
    text = "the quick brown fox 日本語 and 🙂"
    ids = tokenizer.encode(text)
    context = ScriptedContext([*ids, *SCRIPT])
    body = {"prompt": [5], "max_tokens": 200, "stop": stop, "logprobs": 0, "stream": stream}
    async with http(checkpoint, context) as client:
        answer = await client.post(
            "/v1/completions", json={**body, **({"stream_options": {"include_usage": True}} if stream else {})}
        )
    pieces = events_of(answer.text)[:-1] if stream else [answer.json()]
    told = [choice for piece in pieces for choice in piece["choices"]]
    kept = "".join(choice["text"] for choice in told)
    assert kept == text[: text.index(stop)]
    tokens = [token for choice in told for token in choice["token_ids"]]
    assert tokens == ids[: len(tokens)]
    assert tokenizer.decode(tokens).rstrip("\ufffd").startswith(kept.rstrip("\ufffd"))
    assert not tokenizer.decode(tokens[:-1]).startswith(kept) or not tokens or not kept
    assert pieces[-1]["usage"]["completion_tokens"] == len(tokens)
    assert [logprob for choice in told for logprob in choice["logprobs"]["token_logprobs"]] == [
        -float(i) for i in range(len(tokens))
    ]
    assert told[-1]["finish_reason"] == "stop"


async def test_a_stop_string_ends_the_work_before_the_client_reads(checkpoint: Path, tokenizer: Tokenizer) -> None:
    context = ScriptedContext([*tokenizer.encode("the fox"), *SCRIPT], hang_at(4))
    async with http(checkpoint, context) as client:
        body = {"prompt": [5], "max_tokens": 200, "stop": "fox"}
        answer = await client.post("/v1/completions", json=body)
        assert answer.json()["choices"][0]["text"] == "the "
        await asyncio.wait_for(context.left.wait(), 10)
    assert context.running == 0
