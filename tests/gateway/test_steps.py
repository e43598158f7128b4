"""Blocks on their way: shown when asked for, beside the committed text and never in it; with real towers."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest

from twotower.events import Block, Finished, Shown
from twotower.request import Mode
from twotower.text.tokenizer import Tokenizer

from .conftest import BLOCK
from .test_http_face import client_of
from .test_logprobs import openai_of, stack

ASKED: dict[str, Any] = {"prompt": "the fox", "max_tokens": 10, "gamma": 0.9, "ignore_eos": True}


def sse_of(text: str) -> list[tuple[str, Any]]:
    """Type and data of each event."""
    events = []
    for part in text.removesuffix("\n\n").split("\n\n"):
        fields = dict(line.split(": ", 1) for line in part.split("\n"))
        data = fields["data"]
        events.append((fields.get("event", "message"), data if data == "[DONE]" else json.loads(data)))
    return events


async def test_a_block_after_each_of_its_forwards(checkpoint: Path) -> None:
    async with stack(checkpoint) as (_, front), front.client() as client:
        asked: dict[str, Any] = {"max_tokens": 10, "gamma": 0.9, "ignore_eos": True, "logprobs": 0}
        plain = [event async for event in client.generate("the fox", **asked)]
        events = [event async for event in client.generate("the fox", stream_steps=True, **asked)]
        ar = [event async for event in client.generate("the fox", stream_steps=True, mode=Mode.AR, max_tokens=4)]
    assert not any(isinstance(event, Shown) for event in (*plain, *ar))
    without = [event for event in events if not isinstance(event, Shown | Finished)]
    assert without[1:] == [event for event in plain if not isinstance(event, Finished)][1:]  # all but the request's id
    shown: list[Shown] = []
    for event in events:
        if isinstance(event, Shown):
            shown.append(event)
        if not isinstance(event, Block):
            continue
        steps = [one.step for one in shown]
        assert {one.block for one in shown} == {event.index}
        assert [step.number for step in steps] == list(range(1, event.forwards + 1))
        size = min(BLOCK, 10 - event.index * BLOCK)
        for step in steps:
            assert len(step.token_ids) == len(step.committed) == len(step.confidence) == size
            assert all(0 < confidence <= 1 for confidence in step.confidence)
        for step, after in itertools.pairwise(steps):
            for position in range(size):
                if step.committed[position]:  # for good
                    assert after.committed[position]
                    assert after.token_ids[position] == step.token_ids[position]
                    assert after.confidence[position] == step.confidence[position]
        assert steps[-1].token_ids == event.token_ids
        assert all(steps[-1].committed)
        for position, told in enumerate(event.logprobs):
            assert told.logprob == pytest.approx(math.log(steps[-1].confidence[position]), abs=1e-4)
            first = next(step.number for step in steps if step.committed[position])
            assert told.step == first
        shown = []
    assert shown == []


async def test_events_of_their_own_type(checkpoint: Path, tokenizer: Tokenizer) -> None:
    async with stack(checkpoint) as (_, front), client_of(front) as client:
        plain = await client.post("/v1/completions", json={**ASKED, "stream": True})
        answer = await client.post("/v1/completions", json={**ASKED, "stream": True, "stream_steps": True, "n": 2})
        refused = await client.post("/v1/completions", json={**ASKED, "stream_steps": True})
    assert {kind for kind, _ in sse_of(plain.text)} == {"message"}
    events = sse_of(answer.text)
    steps = [data for kind, data in events if kind == "step"]
    assert {data["step"]["index"] for data in steps} == {0, 1}
    assert all(data["choices"] == [] and data["object"] == "text_completion.step" for data in steps)
    for data in steps:
        step = data["step"]
        assert step["tokens"] == [tokenizer.name(token) for token in step["token_ids"]]
    pieces = [data["choices"][0] for kind, data in events[:-1] if kind == "message"]
    texts = ["".join(piece["text"] for piece in pieces if piece["index"] == index) for index in (0, 1)]
    whole = "".join(data["choices"][0]["text"] for _, data in sse_of(plain.text)[:-1])
    assert texts[0] == whole
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "stream_steps")


async def test_an_openai_client_that_asks_for_them_keeps_its_text_clean(checkpoint: Path) -> None:
    async with stack(checkpoint) as (_, front), openai_of(front) as client:
        extra = {"gamma": 0.9, "ignore_eos": True}
        whole = await client.completions.create(model="tiny", prompt="the fox", max_tokens=10, extra_body=extra)
        stream = await client.completions.create(
            model="tiny", prompt="the fox", max_tokens=10, stream=True, extra_body={**extra, "stream_steps": True}
        )
        chunks = [chunk async for chunk in stream]
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == whole.choices[0].text
    assert any(chunk.object == "text_completion.step" for chunk in chunks)  # type: ignore[comparison-overlap]


async def test_steps_survive_the_death_of_a_worker(checkpoint: Path) -> None:
    """Some may come again; the text does not."""
    async with stack(checkpoint) as (running, front), front.client() as client:
        asked: dict[str, Any] = {"max_tokens": 40, "gamma": 1.0, "steps": BLOCK, "ignore_eos": True}
        expected = [t async for e in client.generate("the fox", **asked) if isinstance(e, Block) for t in e.token_ids]
        running.workers[0].slow_down()
        tokens: list[int] = []
        async for event in client.generate("the fox", stream_steps=True, **asked):
            if isinstance(event, Block):
                tokens += event.token_ids
                if event.index == 2:
                    running.start_worker()
                    dying = asyncio.create_task(running.workers[0].die())
        await dying
        running.workers.pop(0)
    assert tokens == expected
