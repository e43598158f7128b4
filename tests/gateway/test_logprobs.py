"""Logprobs through the whole stack: real towers behind a gateway, asked by our client and by OpenAI's."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types import Completion

from tests.support.gateways import RunningGateway, gateway, replica
from tests.support.scripted_context import ScriptedContext
from tests.support.towers import Towers, towers
from tests.support.waiting import until
from twotower.engine.local import LocalEngine
from twotower.errors import DeadlineExceeded
from twotower.events import Block
from twotower.request import GenerationParams, Mode
from twotower.text.tokenizer import Tokenizer

from .conftest import BLOCK

EOS = 2
ASKED = {"model": "tiny", "prompt": "the fox", "max_tokens": 60, "seed": 2, "temperature": 1.0}


@asynccontextmanager
async def stack(checkpoint: Path) -> AsyncIterator[tuple[Towers, RunningGateway]]:
    async with towers(checkpoint) as running:
        running.start_worker()
        async with gateway(checkpoint, replicas=[replica("context", "c", running.service.sessions.address)]) as front:
            yield running, front


def openai_of(front: RunningGateway) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{front.http}/v1", api_key="x", max_retries=0)


@pytest.mark.parametrize("mode", [Mode.DIFFUSION, Mode.AR])
async def test_services_tell_what_one_process_tells(checkpoint: Path, mode: Mode) -> None:
    local = LocalEngine(checkpoint, threads=1)
    asked = [(0.0, 3), (0.9, 5), (0.9, None), (1.5, 0)]
    async with stack(checkpoint) as (_, front), front.client() as client:

        async def one(temperature: float, logprobs: int | None) -> list[Block]:
            events = client.generate(
                [5, 6, 7], mode=mode, max_tokens=10, temperature=temperature, seed=4, logprobs=logprobs, ignore_eos=True
            )
            return [event async for event in events if isinstance(event, Block)]

        results = await asyncio.gather(*(one(*request) for request in asked))
    for (temperature, logprobs), blocks in zip(asked, results, strict=True):
        params = GenerationParams(mode, 10, BLOCK, BLOCK, temperature=temperature, seed=4, logprobs=logprobs)
        expected = list(local.blocks([5, 6, 7], params))
        assert [block.token_ids for block in blocks] == [tuple(block.token_ids) for block in expected]
        for block, there in zip(blocks, expected, strict=True):
            assert [told.logprob for told in block.logprobs] == pytest.approx([t.logprob for t in there.logprobs], abs=1e-4)
            assert [[i for i, _ in told.top] for told in block.logprobs] == [[i for i, _ in t.top] for t in there.logprobs]
            assert len(block.logprobs) == (0 if logprobs is None else len(block.token_ids))


def lists_of(pieces: list[Completion]) -> tuple[list[str], list[float], list[dict[str, float]], list[int]]:
    """OpenAI's four lists, of all pieces together."""
    told = [piece.choices[0].logprobs for piece in pieces if piece.choices]
    joined: list[list[Any]] = [
        list(itertools.chain.from_iterable(getattr(one, name) or () for one in told))
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")
    ]
    return tuple(joined)  # type: ignore[return-value]


def text_of(pieces: list[Completion]) -> str:
    return "".join(piece.choices[0].text for piece in pieces)


async def ask(client: openai.AsyncOpenAI, stream: bool, **fields: Any) -> list[Completion]:
    """The reply's pieces: one, if it is no stream."""
    answer: Any = await client.completions.create(**{**ASKED, **fields}, stream=stream)
    return [piece async for piece in answer] if stream else [answer]


async def test_the_openai_client(checkpoint: Path, tokenizer: Tokenizer) -> None:
    async with stack(checkpoint) as (_, front), openai_of(front) as client, front.client() as ours:
        whole, streamed = await ask(client, False, logprobs=3), await ask(client, True, logprobs=3)
        events = ours.generate("the fox", max_tokens=60, seed=2, temperature=1.0, logprobs=3)
        blocks = [event async for event in events if isinstance(event, Block)]
        bare = await ask(client, False, logprobs=0)
        without = await ask(client, False)
    assert lists_of(whole) == lists_of(streamed)
    assert text_of(whole) == text_of(streamed)
    tokens, logprobs, tops, offsets = lists_of(whole)
    ids = [token for block in blocks for token in block.token_ids]
    told = [entry for block in blocks for entry in block.logprobs]
    assert tokens == [tokenizer.name(token) for token in ids]
    assert logprobs == [entry.logprob for entry in told]
    for token, entry, top in zip(ids, told, tops, strict=True):
        likeliest = [tokenizer.name(i) for i, _ in entry.top]
        assert list(top)[:3] == likeliest
        assert top[tokenizer.name(token)] == entry.logprob
        assert len(top) == len({*likeliest, tokenizer.name(token)})
    assert any(len(top) == 4 for top in tops)  # a drawn token that is none of the likeliest is told, too
    # Each piece of the stream tells of its own tokens.
    for piece in streamed:
        choice = piece.choices[0]
        assert choice.model_extra is not None
        assert choice.logprobs is not None
        assert choice.logprobs.tokens == [tokenizer.name(token) for token in choice.model_extra["token_ids"]]
    # A token that is text is found at its place; what is no text by itself is there with the character it is part of.
    text, found = text_of(whole), 0
    for token, offset in zip(ids, offsets, strict=True):
        if "\ufffd" not in tokenizer.decode([token]) and "\ufffd" not in text[max(0, offset - 4) : offset + 4]:
            name = "" if token in (*tokenizer.special_ids, EOS) else tokenizer.name(token)
            assert text[offset : offset + len(name)] == name
            found += bool(name)
    assert found > 5
    assert offsets == sorted(offsets)
    assert offsets[0] == 0
    assert lists_of(bare) == (tokens, logprobs, [], offsets)
    assert bare[0].choices[0].logprobs is not None
    assert bare[0].choices[0].logprobs.top_logprobs is None
    assert without[0].choices[0].logprobs is None


async def test_the_lists_end_where_a_stop_string_cuts_the_text(checkpoint: Path, tokenizer: Tokenizer) -> None:
    async with stack(checkpoint) as (running, front), openai_of(front) as client:

        async def idle() -> None:
            """A session that a stop string ended leaves the batch first: in fp32, who shares it can change a last bit."""
            await until(lambda: not len(running.service.sessions) and not running.workers[0].worker.load)

        (whole,) = await ask(client, False, logprobs=1)
        tokens, logprobs, tops, offsets = lists_of([whole])
        text, cases = whole.choices[0].text, 0
        for start in range(0, len(text) - 4, 5):
            stop = text[start : start + 3]
            kept = text.index(stop)
            count = sum(offset < kept for offset in offsets)
            for stream in (False, True):
                await idle()
                pieces = await ask(client, stream, logprobs=1, stop=[stop])
                assert text_of(pieces) == text[:kept]
                assert pieces[-1].choices[0].finish_reason == "stop"
                assert lists_of(pieces) == (tokens[:count], logprobs[:count], tops[:count], offsets[:count])
            cases += 0 < count < len(tokens)
        assert cases > 3
        # A stop string that never comes cuts nothing, though text was held back for it.
        await idle()
        pieces = await ask(client, True, logprobs=1, stop=[text[-2:] + "never"])
        assert (text_of(pieces), lists_of(pieces)) == (text, (tokens, logprobs, tops, offsets))


@pytest.mark.parametrize(
    ("stop", "kept", "text"),
    [
        ([], None, "the 日 fox"),
        (["zzz"], None, "the 日 fox"),
        (["fox!"], None, "the 日 fox"),  # held back to the end
        (["fox"], "fox", "the 日 "),
        (["日"], "日", "the "),
        (["the"], "the", ""),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_places_in_the_text(
    checkpoint: Path, tokenizer: Tokenizer, stop: list[str], kept: str | None, text: str, stream: bool
) -> None:
    """A character of several tokens, an end-of-sequence token that does not show, and every kind of stop."""
    whole = "the 日 fox"
    ids = [*tokenizer.encode(whole), EOS]
    encoded = [len(bytes_of(tokenizer, ids[:i]).decode(errors="ignore")) for i in range(len(ids))]
    count = len(ids) if kept is None else sum(offset < whole.index(kept) for offset in encoded)
    async with gateway(checkpoint, ScriptedContext(ids)) as front, openai_of(front) as client:
        pieces = await ask(client, stream, logprobs=0, stop=stop)
    tokens, logprobs, _, offsets = lists_of(pieces)
    assert text_of(pieces) == text
    assert tokens == [tokenizer.name(token) for token in ids[:count]]
    assert (tokens[-1:] == ["</s>"]) == (kept is None)
    assert offsets == encoded[:count]
    assert logprobs == [-float(place) for place in range(count)]


def bytes_of(tokenizer: Tokenizer, ids: list[int]) -> bytes:
    """What byte-level tokens stand for, without a decoder: by the alphabet that names them."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
    names = (tokenizer._inner.id_to_token(token) or "" for token in ids if token not in tokenizer.special_ids)
    return bytes(alphabet[character] for name in names for character in name)


async def test_each_choice_has_its_own(checkpoint: Path) -> None:
    async with stack(checkpoint) as (_, front), openai_of(front) as client:
        (reply,) = await ask(client, False, prompt=["the fox", "dog"], n=2, logprobs=2)
        alone = [
            (await ask(client, False, prompt=prompt, seed=seed, logprobs=2))[0].choices[0]
            for prompt in ("the fox", "dog")
            for seed in (2, 3)
        ]
    for choice, expected in zip(reply.choices, alone, strict=True):
        assert choice.logprobs is not None
        assert expected.logprobs is not None
        assert choice.text == expected.text
        assert choice.logprobs.tokens == expected.logprobs.tokens
        assert choice.logprobs.token_logprobs == pytest.approx(expected.logprobs.token_logprobs, abs=1e-4)


async def test_without_a_tokenizer_tokens_are_ids(bare_checkpoint: Path) -> None:
    async with stack(bare_checkpoint) as (_, front), openai_of(front) as client:
        for stream in (False, True):
            pieces = await ask(client, stream, prompt=[5, 6], max_tokens=6, logprobs=1)
            tokens, logprobs, tops, offsets = lists_of(pieces)
            ids = [token for piece in pieces for token in (piece.choices[0].model_extra or {})["token_ids"]]
            assert tokens == [str(token) for token in ids]
            assert offsets == [0] * len(ids)
            assert all(top[str(token)] == logprob for token, logprob, top in zip(ids, logprobs, tops, strict=True))


@pytest.mark.parametrize("face", ["grpc", "http", "http-stream"])
async def test_a_deadline_frees_the_slots(checkpoint: Path, face: str) -> None:
    async with stack(checkpoint) as (running, front), front.client() as ours, openai_of(front) as client:
        running.workers[0].slow_down()
        if face == "grpc":
            with pytest.raises(DeadlineExceeded):
                async for _ in ours.generate([5], max_tokens=480, gamma=1.0, steps=BLOCK, ignore_eos=True, timeout_s=0.4):
                    pass
        else:
            asked = {"max_tokens": 480, "extra_body": {"gamma": 1.0, "ignore_eos": True, "timeout_s": 0.4}}
            with pytest.raises(openai.APIError) as caught:
                await ask(client, face == "http-stream", **asked)
            if isinstance(caught.value, openai.APIStatusError):
                assert caught.value.status_code == 504
            assert caught.value.body["type"] == "timeout_error"  # type: ignore[index]
        pools = [running.pool, *(one.pool for one in running.workers)]
        await until(lambda: len(running.service.sessions) == 0 and all(p.used_slots == p.used_pages == 0 for p in pools))
