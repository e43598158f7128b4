"""Prompts with the log probabilities of their tokens: real towers behind a gateway, asked the way lm-eval asks."""

from __future__ import annotations

import asyncio
import dataclasses
import math
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.gateways import gateway, replica
from tests.support.scripted_context import ScriptedContext
from tests.support.towers import towers
from tests.support.waiting import until
from twotower.engine.local import LocalEngine
from twotower.request import GenerationParams, Mode
from twotower.text.tokenizer import Tokenizer

from .test_failures import SCRIPT
from .test_http_face import client_of, events_of, http
from .test_logprobs import stack

TEXT = "the quick brown fox 日本語 jumps"


async def ask(client: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    answer = await client.post("/v1/completions", json={"prompt": TEXT, "echo": True, "logprobs": 1, **fields})
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    return body


async def test_a_prompts_log_probabilities(checkpoint: Path, tokenizer: Tokenizer) -> None:
    """They are those of the context tower when it writes the same tokens itself."""
    local = LocalEngine(checkpoint, threads=1)
    params = GenerationParams(Mode.AR, 20, temperature=1.0, seed=3, logprobs=2)
    blocks = list(local.blocks([5, 6, 7], params))
    ids = [5, 6, 7, *(token for block in blocks for token in block.token_ids)]
    expected = [one.logprob for block in blocks for one in block.logprobs]
    async with stack(checkpoint) as (running, front), client_of(front) as client:
        body = await ask(client, prompt=ids, max_tokens=0)
        (choice,) = body["choices"]
        assert choice["token_ids"] == ids
        told = choice["logprobs"]
        assert told["token_logprobs"][0] is None
        assert told["top_logprobs"][0] is None
        assert told["token_logprobs"][3:] == pytest.approx(expected, abs=1e-4)
        assert choice["finish_reason"] == "length"
        assert (body["usage"]["prompt_tokens"], body["usage"]["completion_tokens"]) == (len(ids), 0)
        # Text, and places in it.
        body = await ask(client, max_tokens=0)
        (choice,) = body["choices"]
        told, tokens = choice["logprobs"], tokenizer.encode(TEXT)
        assert (choice["text"], choice["token_ids"]) == (TEXT, tokens)
        assert told["tokens"] == [tokenizer.name(token) for token in tokens]
        starts = [len(tokenizer.decode(tokens[:i]).rstrip("\ufffd")) for i in range(len(tokens))]
        assert told["text_offset"] == starts
        # In a batch, and alone, in a stream and whole: the same.
        several = await ask(client, prompt=[TEXT, "the fox", TEXT], max_tokens=0)
        assert [one["index"] for one in several["choices"]] == [0, 1, 2]
        assert several["choices"][2]["logprobs"]["token_logprobs"][1:] == pytest.approx(told["token_logprobs"][1:], abs=1e-4)
        answer = await client.post(
            "/v1/completions", json={"prompt": TEXT, "echo": True, "logprobs": 1, "max_tokens": 0, "stream": True}
        )
        (streamed,) = events_of(answer.text)[:-1]
        assert streamed["choices"][0]["text"] == TEXT
        assert streamed["choices"][0]["logprobs"]["text_offset"] == starts
        # Nothing is left of them.
        await until(lambda: running.pool.used_slots == running.pool.used_pages == 0)
        assert 'requests_total{mode="score",outcome="completed"}' in (await client.get("/metrics")).text


@pytest.mark.parametrize("mode", ["ar", "diffusion"])
async def test_what_follows_the_prompt_follows_it(checkpoint: Path, tokenizer: Tokenizer, mode: str) -> None:
    """lm-eval asks for one token more than it wants, and leaves it out."""
    tokens = tokenizer.encode(TEXT)
    async with stack(checkpoint) as (_, front), client_of(front) as client:
        body = await ask(client, prompt=[tokens, tokens[:7]], max_tokens=1, temperature=0, seed=1234, mode=mode)
        alone = await client.post("/v1/completions", json={"prompt": tokens, "max_tokens": 1, "logprobs": 1, "mode": mode})
        (last,) = alone.json()["choices"][0]["token_ids"]
        for choice, prompt in zip(body["choices"], (tokens, tokens[:7]), strict=True):
            told = choice["logprobs"]
            assert choice["token_ids"][:-1] == prompt
            assert len(told["tokens"]) == len(told["token_logprobs"]) == len(told["top_logprobs"]) == len(prompt) + 1
            for token, top in zip(told["token_logprobs"][1:], told["top_logprobs"][1:], strict=True):
                assert token <= max(top.values())
            assert told["text_offset"] == sorted(told["text_offset"])
        assert body["choices"][0]["token_ids"][-1] == last
        assert body["choices"][0]["text"] == TEXT + alone.json()["choices"][0]["text"]
        assert body["choices"][0]["logprobs"]["text_offset"][-1] == len(TEXT)
        assert body["usage"]["completion_tokens"] == 2
        assert body["usage"]["prompt_tokens"] == len(tokens) + 7


async def test_an_echo_without_logprobs_asks_no_context(checkpoint: Path) -> None:
    context = ScriptedContext(SCRIPT)
    async with http(checkpoint, context) as client:
        body = await ask(client, logprobs=None, max_tokens=0)
        assert (body["choices"][0]["text"], body["choices"][0]["logprobs"]) == (TEXT, None)
        assert context.opened == []
        body = await ask(client, logprobs=None, max_tokens=4, prompt=[5], n=2)
        assert [choice["token_ids"] for choice in body["choices"]] == [[5, *SCRIPT[:4]]] * 2
        for fields in ({"max_tokens": 0, "echo": False}, {"max_tokens": 0, "prompt": [999]}, {"logprobs": 6}):
            answer = await client.post("/v1/completions", json={"prompt": "x", "echo": True, **fields})
            assert answer.status_code == 400


async def test_scoring_needs_no_denoiser_and_goes_elsewhere_when_a_context_dies(checkpoint: Path) -> None:
    async with towers(checkpoint) as running:
        live = replica("context", "c", running.service.sessions.address)
        async with gateway(checkpoint, replicas=[live], reopen_wait_s=0.2) as front, client_of(front) as client:
            expected = await ask(client, max_tokens=0)
            front.replicas.denoisers = [dataclasses.replace(one, capacity=0) for one in front.replicas.denoisers]
            front.replicas.contexts.append(replica("context", "dead", "127.0.0.1:1", load=-5))
            async with asyncio.timeout(10):
                while (await client.get("/readyz")).status_code == 200:
                    pass
            for _ in range(3):
                assert (await ask(client, max_tokens=0))["choices"] == expected["choices"]


async def test_a_client_that_leaves_frees_the_memory(checkpoint: Path) -> None:
    async with towers(checkpoint, max_sessions=2, max_waiting=64) as running:
        live = replica("context", "c", running.service.sessions.address)
        async with gateway(checkpoint, replicas=[live]) as front, client_of(front) as client:
            body = {"prompt": [[5] * 500] * 40, "echo": True, "logprobs": 5, "max_tokens": 0}
            task = asyncio.create_task(client.post("/v1/completions", json=body))
            await until(lambda: running.pool.used_slots)
            task.cancel()
            await asyncio.wait((task,))
            await until(lambda: running.pool.used_slots == running.pool.used_pages == 0 and not running.loop.waiting)


async def test_details_say_when_and_how_surely(checkpoint: Path) -> None:
    async with stack(checkpoint) as (_, front), client_of(front) as client:
        body = {"prompt": TEXT, "max_tokens": 22, "ignore_eos": True, "details": True, "gamma": 0.9}
        (choice,) = (await client.post("/v1/completions", json=body)).json()["choices"]
        told = (await client.post("/v1/completions", json={**body, "logprobs": 0})).json()["choices"][0]["logprobs"]
        answer = await client.post("/v1/completions", json={**body, "stream": True})
        streamed = [one for event in events_of(answer.text)[:-1] for one in event["choices"][0]["details"]]
        (ar,) = (await client.post("/v1/completions", json={**body, "mode": "ar"})).json()["choices"]
    details = choice["details"]
    assert choice["logprobs"] is None
    assert [one["token_id"] for one in details] == choice["token_ids"]
    assert [one["block"] for one in details] == [i // 4 for i in range(22)]
    for block in range(5):
        steps = [one["step"] for one in details if one["block"] == block]
        assert min(steps) == 1
        assert max(steps) == len(set(steps)) <= 4
    assert any(one["step"] > 1 for one in details)
    assert all(0 < one["confidence"] <= 1 for one in details)
    assert streamed == details
    assert [math.log(one["confidence"]) for one in details] == pytest.approx(told["token_logprobs"], abs=1e-5)
    assert [one["step"] for one in ar["details"]] == [1] * 22
    assert [one["block"] for one in ar["details"]] == list(range(22))
