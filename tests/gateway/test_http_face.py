"""HTTP: the official openai client, server-sent events, errors, probes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.support.gateways import RunningGateway, gateway
from tests.support.scripted_context import FORWARDS, ScriptedContext, at_once
from tests.support.waiting import until
from twotower.errors import NonFiniteLogits, Overloaded
from twotower.text.tokenizer import Tokenizer
from twotower.v1 import inference_pb2

from .conftest import BLOCK, MAX_CONTEXT
from .test_failures import SCRIPT, fail_at, hang_at

EOS = 2
TEXT = "the quick brown fox 日本語 🙂"


@asynccontextmanager
async def http(checkpoint: Path, *contexts: ScriptedContext, **settings: Any) -> AsyncIterator[httpx.AsyncClient]:
    async with gateway(checkpoint, *contexts, **settings) as running, client_of(running) as client:
        yield client


def client_of(running: RunningGateway) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=running.http, timeout=20, trust_env=False)


def events_of(body: str) -> list[Any]:
    """Data of server-sent events; [DONE] as a string."""
    assert body.endswith("\n\n")
    parts = body.removesuffix("\n\n").split("\n\n")
    assert all(part.startswith("data: ") and "\n" not in part for part in parts)
    return [part[6:] if part == "data: [DONE]" else json.loads(part[6:]) for part in parts]


async def test_a_completion_is_what_openai_says_and_a_little_more(checkpoint: Path, tokenizer: Tokenizer) -> None:
    ids = [*tokenizer.encode(TEXT), EOS]
    async with http(checkpoint, ScriptedContext(ids)) as client:
        answer = await client.post("/v1/completions", json={"prompt": "the fox", "max_tokens": 100, "model": "tiny"})
    assert answer.status_code == 200
    body = answer.json()
    prompt_tokens, blocks = len(tokenizer.encode("the fox")), -(-len(ids) // BLOCK)
    assert body.pop("id").removeprefix("cmpl-") == answer.headers["x-request-id"]
    assert isinstance(body.pop("created"), int)
    assert body == {
        "object": "text_completion",
        "model": "tiny",
        "choices": [{"index": 0, "text": TEXT, "finish_reason": "stop", "logprobs": None, "token_ids": ids}],
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": len(ids),
            "total_tokens": prompt_tokens + len(ids),
            "forwards": FORWARDS * blocks,
            "blocks": blocks,
            "tokens_per_forward": round(len(ids) / (FORWARDS * blocks), 3),
        },
    }


async def test_the_default_is_16_tokens(checkpoint: Path) -> None:
    async with http(checkpoint, ScriptedContext(SCRIPT)) as client:
        for prompt, expected in (([5], 16), ([5] * (MAX_CONTEXT - 3), 3)):
            body = (await client.post("/v1/completions", json={"prompt": prompt})).json()
            assert body["usage"]["completion_tokens"] == expected
            assert body["choices"][0]["finish_reason"] == "length"


async def test_several_choices_have_seeds_of_their_own_and_one_prompt(checkpoint: Path) -> None:
    context = ScriptedContext(SCRIPT)
    asked = {"prompt": [[5, 6, 7], [8]], "n": 3, "seed": 4, "max_tokens": 8, "temperature": 1, "top_p": 0.9, "top_k": 40}
    async with http(checkpoint, context) as client:
        body = (await client.post("/v1/completions", json=asked)).json()
        text = (
            await client.post("/v1/completions", json={**asked, "stream": True, "stream_options": {"include_usage": True}})
        ).text
    assert [choice["index"] for choice in body["choices"]] == list(range(6))
    assert (body["usage"]["prompt_tokens"], body["usage"]["completion_tokens"]) == (4, 48)
    assert events_of(text)[-2]["usage"] == body["usage"]
    opened = sorted((len(request.prompt.ids), request.params.seed) for request in context.opened[:6])
    assert opened == [(n, seed) for n in (1, 3) for seed in (4, 5, 6)]
    assert {(request.params.top_k, request.params.top_p) for request in context.opened} == {(40, 0.9)}


async def test_a_stream_has_a_chunk_per_block(checkpoint: Path, tokenizer: Tokenizer) -> None:
    ids = [*tokenizer.encode(TEXT), EOS]
    async with http(checkpoint, ScriptedContext(ids)) as client:
        request = {"prompt": "x", "max_tokens": 100, "stream": True, "stream_options": {"include_usage": True}, "block_size": 8}
        answer = await client.post("/v1/completions", json=request)
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    *chunks, last, usage, done = events_of(answer.text)
    assert done == "[DONE]"
    assert [len(chunk["choices"][0]["token_ids"]) for chunk in chunks] == [8] * (len(ids) // 8) + [len(ids) % 8]
    assert "".join(chunk["choices"][0]["text"] for chunk in (*chunks, last)) == TEXT
    assert all(chunk["choices"][0]["finish_reason"] is None and chunk["usage"] is None for chunk in chunks)
    assert last["choices"][0]["finish_reason"] == "stop"
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == len(ids)
    assert usage["usage"]["forwards"] == FORWARDS * len(chunks)
    assert len({chunk["id"] for chunk in (*chunks, last, usage)}) == 1
    assert [chunk.get("warnings") is not None for chunk in (*chunks, last, usage)] == [True] + [False] * (len(chunks) + 1)


async def test_a_block_arrives_while_the_next_is_made(checkpoint: Path) -> None:
    context = ScriptedContext(SCRIPT, hang_at(1))
    request = {"prompt": [5], "stream": True}
    async with http(checkpoint, context) as client, client.stream("POST", "/v1/completions", json=request) as answer:
        line = await anext(answer.aiter_lines())
        assert json.loads(line[6:])["choices"][0]["token_ids"] == SCRIPT[:BLOCK]
        assert context.running == 1


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("hang", [0, 1])
async def test_a_client_that_leaves_ends_the_work(checkpoint: Path, stream: bool, hang: int) -> None:
    """While it waits for the first block, and in the middle."""
    context = ScriptedContext(SCRIPT, hang_at(hang))
    async with gateway(checkpoint, context) as running:
        async with client_of(running) as client:
            task = asyncio.create_task(client.post("/v1/completions", json={"prompt": [5], "stream": stream}))
            await until(lambda: context.running)
            task.cancel()
            await asyncio.wait((task,))
        await asyncio.wait_for(context.left.wait(), 10)
        assert context.running == 0
        async with client_of(running) as client:
            await until_metric(client, 'twotower_gateway_requests_total{mode="diffusion",outcome="cancelled"} 1.0')


async def until_metric(client: httpx.AsyncClient, line: str) -> None:
    async with asyncio.timeout(10):
        while line not in (await client.get("/metrics")).text.splitlines():
            pass


async def test_several_prompts_are_served_together(checkpoint: Path, tokenizer: Tokenizer) -> None:
    context = ScriptedContext([*tokenizer.encode("brown fox"), EOS])
    async with http(checkpoint, context) as client:
        body = (await client.post("/v1/completions", json={"prompt": ["a", "b", "c"], "max_tokens": 90})).json()
        assert [(choice["index"], choice["text"]) for choice in body["choices"]] == [(i, "brown fox") for i in range(3)]
        assert body["usage"]["completion_tokens"] == 3 * len(context.script)
        assert body["usage"]["prompt_tokens"] == 3
        answer = await client.post("/v1/completions", json={"prompt": [[5], [6]], "max_tokens": 90, "stream": True})
        texts = {0: "", 1: ""}
        for event in events_of(answer.text)[:-1]:
            texts[event["choices"][0]["index"]] += event["choices"][0]["text"]
        assert texts == {0: "brown fox", 1: "brown fox"}


async def test_one_bad_prompt_of_several_refuses_all(checkpoint: Path) -> None:
    context = ScriptedContext(SCRIPT)
    async with http(checkpoint, context, max_in_flight=3) as client:
        for prompts in ([[5], [999]], [[5]] * 4):
            answer = await client.post("/v1/completions", json={"prompt": prompts})
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, "prompt")
    assert context.opened == []


async def test_stop_strings_and_our_fields(checkpoint: Path, tokenizer: Tokenizer) -> None:
    context = ScriptedContext(tokenizer.encode(TEXT) + SCRIPT)
    async with http(checkpoint, context) as client:
        request = {"prompt": "x", "stop": "fox", "max_tokens": 64, "gamma": 0.5, "steps": 2, "block_size": 3, "seed": 9}
        body = (await client.post("/v1/completions", json=request)).json()
        assert body["choices"][0]["text"] == "the quick brown "
        assert body["choices"][0]["finish_reason"] == "stop"
        await client.post("/v1/completions", json={"prompt": "x", "mode": "ar", "ignore_eos": True, "temperature": 0.5})
    diffusion, ar = (request.params for request in context.opened)
    assert (diffusion.gamma, diffusion.steps, diffusion.block_size, diffusion.seed) == (0.5, 2, 3, 9)
    assert (ar.temperature, list(ar.eos_token_ids)) == (0.5, [])


BAD: list[tuple[dict[str, Any], str]] = [
    ({"prompt": ""}, "prompt"),
    ({"prompt": [320]}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": "a\ud800"}, "prompt"),
    ({}, "prompt"),
    ({"prompt": "x", "max_tokens": 0}, "max_tokens"),
    ({"prompt": "x", "max_tokens": 10**30}, "max_tokens"),
    ({"prompt": "x", "max_tokens": MAX_CONTEXT}, "max_tokens"),
    ({"prompt": "x", "steps": 2**63}, "steps"),
    ({"prompt": "x", "steps": 0}, "steps"),
    ({"prompt": "x", "gamma": 2}, "gamma"),
    ({"prompt": "x", "temperature": -1}, "temperature"),
    ({"prompt": "x", "block_size": 0}, "block_size"),
    ({"prompt": "x", "seed": -1}, "seed"),
    ({"prompt": "x", "seed": 2**64}, "seed"),
    ({"prompt": "x", "stop": [""]}, "stop"),
    ({"prompt": "x", "stop": ["a"] * 17}, "stop"),
    ({"prompt": "x", "mode": "mock-ar"}, "mode"),
    ({"prompt": "x", "eos_token_ids": [-1]}, "eos_token_ids"),
    ({"prompt": "x", "n": 9}, "n"),
    ({"prompt": "x", "top_k": -1}, "top_k"),
    ({"prompt": "x", "top_p": 0}, "top_p"),
    ({"prompt": "x", "logprobs": 6}, "logprobs"),
    ({"prompt": "x", "logprobs": -1}, "logprobs"),
    ({"prompt": "x", "logprobs": 2**63}, "logprobs"),
    ({"prompt": "x", "frobnicate": 1}, "frobnicate"),
    ({"prompt": "x", "\ud800": 1}, "\ud800"),
]


async def test_bad_requests_name_their_field(checkpoint: Path) -> None:
    context = ScriptedContext(SCRIPT)
    async with http(checkpoint, context) as client:
        for fields, param in BAD:
            for stream in (False, True):
                # json.dumps, as httpx would refuse a lone surrogate itself.
                answer = await client.post("/v1/completions", content=json.dumps({**fields, "stream": stream}))
                assert answer.status_code == 400, fields
                error = answer.json()["error"]
                assert set(error) == {"message", "type", "param", "code"}
                assert (error["param"], error["type"]) == (param, "invalid_request_error"), fields
                assert error["message"].startswith(f"{param}: ")
        await until_metric(client, 'twotower_gateway_requests_total{mode="unknown",outcome="invalid"} 10.0')
    assert context.opened == []


async def test_paths_methods_and_bodies(checkpoint: Path) -> None:
    async with http(checkpoint, ScriptedContext(SCRIPT), max_body_bytes=1000) as client:
        large = json.dumps({"prompt": "x" * 1000}).encode()
        answers = [
            (await client.get("/nowhere"), 404, "there is no /nowhere here"),
            (await client.get("/v1/completions/"), 404, "there is no"),
            (await client.get("/v1/completions"), 405, "/v1/completions does not take GET"),
            (await client.post("/v1/models"), 405, "does not take POST"),
            (await client.post("/v1/completions", content=b"{"), 400, "body: is not valid JSON"),
            (
                await client.post("/v1/completions", content=large),
                413,
                "larger than 1000 bytes",
            ),
            (await client.get("/v1/models/other"), 404, "the model 'other' does not exist"),
            (await client.post("/v1/completions", json={"prompt": "x", "model": "gpt"}), 404, "the model 'gpt' does not exist"),
        ]
        for answer, status, message in answers:
            assert answer.status_code == status, message
            assert message in answer.json()["error"]["message"]
            assert answer.json()["error"]["type"] == "invalid_request_error"
        assert answers[2][0].headers["allow"] == "POST"
        assert [answer.json()["error"]["code"] for answer, *_ in answers[-2:]] == ["model_not_found"] * 2


async def test_overload_says_when_to_come_back(checkpoint: Path) -> None:
    context = ScriptedContext(SCRIPT, hang_at(1))
    async with http(checkpoint, context, max_in_flight=1) as client:
        held = asyncio.create_task(client.post("/v1/completions", json={"prompt": [5]}))
        await until(lambda: context.running)
        answer = await client.post("/v1/completions", json={"prompt": [5]})
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
        assert answer.json()["error"]["type"] == "rate_limit_error"
        held.cancel()
        await asyncio.wait((held,))


@pytest.mark.parametrize("stream", [False, True])
async def test_an_error_before_the_first_block_is_a_status(checkpoint: Path, stream: bool) -> None:
    for error, status in ((Overloaded("64 sessions"), 429), (NonFiniteLogits("logits are not finite"), 500)):
        async with http(checkpoint, ScriptedContext(SCRIPT, fail_at(0, error))) as client:
            answer = await client.post("/v1/completions", json={"prompt": [5], "stream": stream})
            assert (answer.status_code, answer.json()["error"]["message"]) == (status, str(error))


async def test_an_error_in_a_stream_is_an_event(checkpoint: Path) -> None:
    context = ScriptedContext(SCRIPT, fail_at(2, NonFiniteLogits("logits are not finite")))
    async with http(checkpoint, context) as client:
        answer = await client.post("/v1/completions", json={"prompt": [5], "stream": True})
        assert answer.status_code == 200
        *chunks, last = events_of(answer.text)
        assert len(chunks) == 2
        assert last == {"error": {"message": "logits are not finite", "type": "server_error", "param": None, "code": None}}


async def test_what_is_not_ours_is_told_as_internal(checkpoint: Path) -> None:
    async with http(checkpoint, ScriptedContext(SCRIPT, fail_at(0, ValueError("secret")))) as client:
        answer = await client.post("/v1/completions", json={"prompt": [5]})
        assert (answer.status_code, answer.json()["error"]["message"]) == (500, "internal error")


async def test_probes_and_metrics(checkpoint: Path) -> None:
    context = ScriptedContext(SCRIPT)
    async with gateway(checkpoint, context, reopen_wait_s=0.2) as running, client_of(running) as client:
        assert (await client.get("/healthz")).json() == {"status": "alive"}
        assert (await client.get("/readyz")).json() == {"status": "ready"}
        await client.post("/v1/completions", json={"prompt": [5, 6], "max_tokens": 8})
        text = (await client.get("/metrics")).text
        for line in (
            'twotower_gateway_requests_total{mode="diffusion",outcome="completed"} 1.0',
            "twotower_gateway_requests_in_flight 0.0",
            "twotower_gateway_prompt_tokens_total 2.0",
            'twotower_gateway_completion_tokens_total{mode="diffusion"} 8.0',
            'twotower_gateway_forwards_total{mode="diffusion"} 6.0',
            'twotower_gateway_time_to_first_block_seconds_count{mode="diffusion"} 1.0',
            'twotower_gateway_request_duration_seconds_count{mode="diffusion"} 1.0',
            "twotower_gateway_contexts_live 1.0",
            "twotower_gateway_denoisers_live 1.0",
        ):
            assert line in text.splitlines()
        running.replicas.denoisers.clear()
        async with asyncio.timeout(10):
            while (answer := await client.get("/readyz")).status_code == 200:
                pass
        assert (answer.status_code, answer.json()) == (503, {"status": "not ready", "reason": "no denoiser is live"})
        answer = await client.post("/v1/completions", json={"prompt": [5]})
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        assert 'mode "ar" works without one' in answer.json()["error"]["message"]
        assert (await client.get("/healthz")).status_code == 200


async def test_a_drain_over_http(checkpoint: Path) -> None:
    go_on = asyncio.Event()

    async def before(number: int) -> None:
        if number == 1:
            await go_on.wait()

    context = ScriptedContext(SCRIPT, before)
    async with gateway(checkpoint, context) as running, client_of(running) as client:
        held = asyncio.create_task(client.post("/v1/completions", json={"prompt": [5]}))
        await until(lambda: context.running)
        running.stop.set()
        async with asyncio.timeout(10):
            while (answer := await client.get("/readyz")).status_code == 200:
                pass
        assert answer.json()["reason"] == "this gateway is shutting down"
        assert (await client.post("/v1/completions", json={"prompt": [5]})).status_code == 503
        go_on.set()
        assert (await held).json()["choices"][0]["token_ids"] == SCRIPT[:16]
        await asyncio.wait_for(running.task, 10)


async def test_the_openai_client(checkpoint: Path, tokenizer: Tokenizer) -> None:
    context = ScriptedContext([*tokenizer.encode(TEXT), EOS])
    async with gateway(checkpoint, context) as running:
        base = f"{running.http}/v1"
        async with openai.AsyncOpenAI(base_url=base, api_key="x", max_retries=0) as client:
            whole = await client.completions.create(
                model="tiny", prompt="the fox", max_tokens=50, temperature=0, extra_body={"gamma": 0.7, "mode": "diffusion"}
            )
            assert whole.choices[0].text == TEXT
            assert whole.choices[0].finish_reason == "stop"
            assert whole.usage is not None
            assert whole.usage.completion_tokens == len(context.script)
            blocks, rate = -(-len(context.script) // BLOCK), (whole.usage.model_extra or {})["tokens_per_forward"]
            assert whole.usage.model_extra == {"forwards": FORWARDS * blocks, "blocks": blocks, "tokens_per_forward": rate}
            stream = await client.completions.create(
                model="tiny", prompt=[5, 6], max_tokens=50, stream=True, stream_options={"include_usage": True}, stop=["zzz"]
            )
            chunks = [chunk async for chunk in stream]
            assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == TEXT
            assert chunks[-1].usage is not None
            assert chunks[-1].usage.prompt_tokens == 2
            assert [model.id async for model in client.models.list()] == ["tiny"]
            assert (await client.models.retrieve("tiny")).id == "tiny"
            with pytest.raises(openai.NotFoundError, match="does not exist"):
                await client.completions.create(model="gpt-3.5", prompt="x")
            with pytest.raises(openai.BadRequestError) as caught:
                await client.completions.create(model="tiny", prompt="x", max_tokens=0)
            assert caught.value.param == "max_tokens"
            context.before = fail_at(1, NonFiniteLogits("logits are not finite"))
            with pytest.raises(openai.APIError, match="logits are not finite"):
                async for _ in await client.completions.create(model="tiny", prompt="x", stream=True):
                    pass
            context.before = fail_at(0, Overloaded("64 sessions"))
            with pytest.raises(openai.RateLimitError):
                await client.completions.create(model="tiny", prompt="x")


async def test_the_sync_openai_client(checkpoint: Path, tokenizer: Tokenizer) -> None:
    def use(base: str) -> str:
        with openai.OpenAI(base_url=base, api_key="x") as client:
            stream = client.completions.create(model="tiny", prompt="the fox", max_tokens=50, stream=True)
            return "".join(chunk.choices[0].text for chunk in stream)

    async with gateway(checkpoint, ScriptedContext([*tokenizer.encode(TEXT), EOS])) as running:
        assert await asyncio.to_thread(use, f"{running.http}/v1") == TEXT


async def test_64_streams_over_http(checkpoint: Path) -> None:
    async with http(checkpoint, ScriptedContext(SCRIPT), ScriptedContext(SCRIPT)) as client:
        request = {"prompt": [5], "max_tokens": 40, "stream": True}
        answers = await asyncio.gather(*(client.post("/v1/completions", json=request) for _ in range(64)))
    for answer in answers:
        tokens = [token for event in events_of(answer.text)[:-1] for token in event["choices"][0]["token_ids"]]
        assert tokens == SCRIPT[:40]


@pytest.mark.parametrize("stream", [False, True])
async def test_what_outlasts_the_drain_is_told_so(checkpoint: Path, stream: bool, caplog: pytest.LogCaptureFixture) -> None:
    context = ScriptedContext(SCRIPT, hang_at(1))
    async with gateway(checkpoint, context, drain_s=0.1) as running, client_of(running) as client:
        request = {"prompt": [5], "max_tokens": 100, "stream": stream}
        asked = asyncio.create_task(client.post("/v1/completions", json=request))
        await until(lambda: context.running)
        await asyncio.sleep(0.2)  # the first block is on its way to the client
        running.stop.set()
        answer = await asked
    if stream:
        assert answer.status_code == 200
        error = json.loads(answer.text.removesuffix("\n\n").split("\n\n")[-1].removeprefix("data: "))["error"]
    else:
        assert answer.status_code == 503
        error = answer.json()["error"]
    assert "shutting down" in error["message"]
    assert not any(record.exc_info for record in caplog.records)


async def test_a_service_tier_is_a_priority(checkpoint: Path) -> None:
    context = ScriptedContext([5, 6, EOS])
    tiers = {"auto": "NORMAL", "default": "NORMAL", "priority": "HIGH", "flex": "LOW"}
    async with http(checkpoint, context) as client:
        for tier in tiers:
            answer = await client.post("/v1/completions", json={"prompt": "fox", "service_tier": tier})
            assert answer.status_code == 200
        refused = await client.post("/v1/completions", json={"prompt": "fox", "service_tier": "scale"})
    assert [inference_pb2.Priority.Name(call.priority) for call in context.opened] == [f"PRIORITY_{p}" for p in tiers.values()]
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "service_tier")


async def test_bodies_are_bounded_together(checkpoint: Path) -> None:
    context = ScriptedContext(SCRIPT, hang_at(3))
    asked = {"prompt": "fox" * 100, "max_tokens": 40, "stream": True}
    async with http(checkpoint, context, max_body_bytes=1000, max_bodies_bytes=1000) as client:
        async with (
            client.stream("POST", "/v1/completions", json=asked) as first,
            client.stream("POST", "/v1/completions", json=asked) as second,
        ):
            assert (first.status_code, second.status_code) == (200, 200)
            refused = await client.post("/v1/completions", json=asked)
            assert (refused.status_code, refused.json()["error"]["type"]) == (429, "rate_limit_error")
            assert "1000 bytes" in refused.json()["error"]["message"]
            assert refused.headers["retry-after"] == "1"
            small = await client.post("/v1/completions", json={"prompt": "fox", "max_tokens": 4})
            assert small.status_code == 200
        await until_metric(client, "twotower_gateway_requests_in_flight 0.0")
        context.before = at_once  # whoever left has given back its bytes
        for _ in range(3):
            assert (await client.post("/v1/completions", json={**asked, "stream": False})).status_code == 200


async def test_a_time_that_passes_while_a_context_is_waited_for(checkpoint: Path) -> None:
    context = ScriptedContext(SCRIPT, hang_at(1))
    async with gateway(checkpoint, context, reopen_wait_s=20.0) as running, client_of(running) as client:
        body = {"prompt": "fox", "max_tokens": 40, "timeout_s": 1.0}
        asked = asyncio.create_task(client.post("/v1/completions", json=body))
        await until(lambda: context.running == 1)
        await context.stop()  # there is no other
        answer = await asyncio.wait_for(asked, 10)
        assert (answer.status_code, answer.json()["error"]["type"]) == (504, "timeout_error")
        await until_metric(client, "twotower_gateway_requests_in_flight 0.0")


async def test_a_time_that_has_passed_ends_the_work(checkpoint: Path) -> None:
    context = ScriptedContext(SCRIPT, hang_at(1))
    async with http(checkpoint, context) as client:
        whole = await client.post("/v1/completions", json={"prompt": "fox", "max_tokens": 40, "timeout_s": 0.3})
        assert (whole.status_code, whole.json()["error"]["type"]) == (504, "timeout_error")
        await asyncio.wait_for(context.left.wait(), 10)
        context.left.clear()
        body = {"prompt": "fox", "max_tokens": 40, "timeout_s": 0.3, "stream": True}
        events = events_of((await client.post("/v1/completions", json=body)).text)
        assert events[0]["choices"][0]["token_ids"] == SCRIPT[:BLOCK]
        assert events[-1]["error"]["type"] == "timeout_error"
        await asyncio.wait_for(context.left.wait(), 10)
        for bad in (0, -1, "soon"):
            refused = await client.post("/v1/completions", json={"prompt": "fox", "timeout_s": bad})
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, "timeout_s")
