"""Chats, where the checkpoint brings a template, with OpenAI's client; and where it brings none."""

from __future__ import annotations

import json
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.support.gateways import RunningGateway, gateway
from tests.support.scripted_context import FORWARDS, ScriptedContext
from twotower.text.tokenizer import Tokenizer

from .conftest import BLOCK
from .test_http_face import EOS, client_of, events_of, http

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'developer' %}{{ raise_exception('no developers') }}{% endif %}"
    "[{{ m.role }}{% if m.name %} {{ m.name }}{% endif %}] {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
ASKED: list[Any] = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "the fox?"}]
RENDERED = "<s>[system] be brief\n[user] the fox?\n[assistant] "
ANSWER = "the quick 日 fox"


@pytest.fixture(scope="session")
def chatty(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a template, and a tokenizer that begins each text with <s>, as the template does."""
    path = shutil.copytree(checkpoint, tmp_path_factory.mktemp("checkpoint") / "chatty")
    (path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "chat_template": TEMPLATE}))
    spec = json.loads((path / "tokenizer.json").read_text())
    piece = {"Sequence": {"id": "A", "type_id": 0}}
    first = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    tokens = {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}
    post = {"type": "TemplateProcessing", "single": [first, piece], "pair": [first, piece, piece], "special_tokens": tokens}
    (path / "tokenizer.json").write_text(json.dumps({**spec, "post_processor": post}))
    return path


@pytest.fixture
def context(tokenizer: Tokenizer) -> ScriptedContext:
    return ScriptedContext([*tokenizer.encode(ANSWER), EOS])


@pytest.fixture
async def running(chatty: Path, context: ScriptedContext) -> AsyncIterator[RunningGateway]:
    async with gateway(chatty, context) as started:
        yield started


def openai_of(front: RunningGateway) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{front.http}/v1", api_key="x", max_retries=0)


async def test_the_openai_client(running: RunningGateway, context: ScriptedContext, tokenizer: Tokenizer) -> None:
    async with openai_of(running) as client:
        whole = await client.chat.completions.create(model="tiny", messages=ASKED, max_completion_tokens=90, seed=4)
        assert whole.object == "chat.completion"
        (choice,) = whole.choices
        assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", ANSWER, "stop")
        assert choice.logprobs is None
        ids, usage = context.script, whole.usage
        assert usage is not None
        assert (usage.prompt_tokens, usage.completion_tokens) == (len(context.opened[0].prompt.ids), len(ids))
        assert (usage.model_extra or {})["forwards"] == FORWARDS * -(-len(ids) // BLOCK)
        # The template has written <s> itself: the tokenizer adds no second one.
        assert context.opened[0].prompt.ids[0] == 1
        assert 1 not in context.opened[0].prompt.ids[1:]
        assert tokenizer.decode(list(context.opened[0].prompt.ids)) == RENDERED.removeprefix("<s>")
        assert (context.opened[0].params.seed, context.opened[0].params.max_tokens) == (4, 90)
        stream = await client.chat.completions.create(
            model="tiny", messages=ASKED, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
        assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
        assert chunks[0].choices[0].delta.role == "assistant"
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == ANSWER
        assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["stop"]
        assert chunks[-1].choices == []
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.completion_tokens == len(ids)
        assert context.opened[1].params.max_tokens == 256


async def test_logprobs_of_chats(running: RunningGateway, context: ScriptedContext, tokenizer: Tokenizer) -> None:
    async with openai_of(running) as client:
        (choice,) = (await client.chat.completions.create(model="tiny", messages=ASKED, logprobs=True, top_logprobs=0)).choices
        assert choice.logprobs is not None
        content = choice.logprobs.content
        assert content is not None
        assert [one.logprob for one in content] == [-float(i) for i in range(len(context.script))]
        assert b"".join(bytes(one.bytes or []) for one in content[:-1]).decode() == ANSWER
        assert [one.token for one in content] == [tokenizer.name(token) for token in context.script]
        assert any(one.token.startswith("bytes:\\x") for one in content)


async def test_parts_names_and_choices(running: RunningGateway, context: ScriptedContext) -> None:
    parts = [{"type": "text", "text": "the "}, {"type": "text", "text": "fox?"}]
    async with client_of(running) as client:
        body = {"messages": [{"role": "user", "content": parts, "name": "Ann", "tool_calls": None}], "n": 2}
        answer = await client.post("/v1/chat/completions", json=body)
        assert [choice["message"]["content"] for choice in answer.json()["choices"]] == [ANSWER] * 2
        assert sorted(request.params.seed for request in context.opened) == [0, 1]
        messages = [{"role": "user", "content": "the fox?", "name": "Ann"}]
        tokens = (await client.post("/tokenize", json={"messages": messages})).json()["tokens"]
        assert tokens == list(context.opened[0].prompt.ids)
        shorter = {"messages": messages, "add_generation_prompt": False}
        assert (await client.post("/tokenize", json=shorter)).json()["count"] < len(tokens)
        plain = (await client.post("/tokenize", json={"prompt": "x"})).json()["tokens"]
        assert plain[0] == 1
        assert (await client.post("/tokenize", json={"prompt": "x", "add_special_tokens": False})).json()["tokens"] == plain[1:]
        streamed = await client.post("/v1/chat/completions", json={**body, "stream": True})
        texts = ["", ""]
        for event in events_of(streamed.text)[:-1]:
            texts[event["choices"][0]["index"]] += event["choices"][0]["delta"].get("content", "")
        assert texts == [ANSWER] * 2


USER = {"role": "user", "content": "x"}

BAD: list[tuple[dict[str, Any], str]] = [
    ({"messages": None}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": "x"}, "messages"),
    ({"messages": ["x"]}, "messages[0]"),
    ({"messages": [USER, {"role": "user"}]}, "messages[1].content"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"content": "x"}]}, "messages[0].role"),
    ({"messages": [{**USER, "tool_calls": [{}]}]}, "messages[0].tool_calls"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
    ({"messages": [{"role": "user", "content": "a\ud800"}]}, "messages[0].content"),
    ({"messages": [{"role": "developer", "content": "x"}]}, "messages"),
    ({"messages": [{"role": "user", "content": "fox " * 2000}]}, "messages"),
    ({"prompt": "x"}, "prompt"),
    ({"echo": True}, "echo"),
    ({"tools": [{"type": "function"}]}, "tools"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"modalities": ["audio"]}, "modalities"),
    ({"logprobs": 1}, "logprobs"),
    ({"logprobs": True, "top_logprobs": 6}, "top_logprobs"),
    ({"top_logprobs": 1}, "top_logprobs"),
    ({"max_completion_tokens": 10_000}, "max_tokens"),
    ({"gamma": 7}, "gamma"),
    ({"n": 9}, "n"),
]


async def test_bad_requests_name_their_field(running: RunningGateway, context: ScriptedContext) -> None:
    async with client_of(running) as client:
        for fields, param in BAD:
            answer = await client.post("/v1/chat/completions", content=json.dumps({"messages": [USER], **fields}))
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), fields
            assert answer.json()["error"]["message"].startswith(f"{param}: ")
        neutral = {"tools": [], "tool_choice": "auto", "parallel_tool_calls": True, "modalities": ["text"], "store": False}
        neutral |= {"response_format": {"type": "text"}, "reasoning_effort": None, "user": "u", "top_logprobs": 0}
        assert (await client.post("/v1/chat/completions", json={"messages": [USER], **neutral})).status_code == 200
        assert (await client.post("/v1/chat/completions", json={"messages": [USER], "model": "no"})).status_code == 404
    assert len(context.opened) == 1


async def test_a_checkpoint_without_a_template_says_so(checkpoint: Path) -> None:
    async with http(checkpoint, ScriptedContext([5])) as client:
        answer = await client.post("/v1/chat/completions", json={"messages": [USER]})
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith("messages: this checkpoint brings no chat template")
    assert "/v1/completions" in answer.json()["error"]["message"]
