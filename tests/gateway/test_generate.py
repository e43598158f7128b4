"""A request through gRPC face and core, over a scripted context."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.gateways import gateway
from tests.support.scripted_context import FORWARDS, ScriptedContext
from twotower.errors import InvalidArgument, Unavailable
from twotower.events import Accepted, Block, Event, Finished
from twotower.gateway.grpc_face import request_from_pb
from twotower.request import FinishReason, Mode, Priority
from twotower.rpc.channel import open_channel
from twotower.text.tokenizer import Tokenizer
from twotower.v1 import inference_pb2, inference_pb2_grpc
from twotower.wire.params import PRIORITY_FROM_PB

from .conftest import BLOCK, MAX_CONTEXT

EOS = 2
TEXT = "then the quick brown fox jumps over größer 日本語 🙂🙂 dogs."


def split(events: list[Event]) -> tuple[Accepted, list[Block], Finished]:
    """The parts, in the order that is promised."""
    first, *blocks, last = events
    assert isinstance(first, Accepted)
    assert isinstance(last, Finished)
    assert all(isinstance(block, Block) and block.index == i for i, block in enumerate(blocks))
    return first, blocks, last  # type: ignore[return-value]


def text_of(blocks: list[Block], last: Finished) -> str:
    return "".join(block.text for block in blocks) + last.text


def ids_of(blocks: list[Block]) -> list[int]:
    return [token for block in blocks for token in block.token_ids]


async def test_text_in_text_out(checkpoint: Path, tokenizer: Tokenizer) -> None:
    script = tokenizer.encode(TEXT)
    context = ScriptedContext([*script, EOS, 7, 7, 7, 7])
    async with gateway(checkpoint, context) as running, running.client() as client:
        first, blocks, last = split([event async for event in client.generate("the fox")])
    assert first.prompt_tokens == len(tokenizer.encode("the fox"))
    assert first.warnings == ()
    assert ids_of(blocks) == [*script, EOS]
    assert text_of(blocks, last) == TEXT
    assert "\ufffd" not in "".join(block.text for block in blocks)
    assert len(blocks) > 5
    count = len(blocks)
    assert last == Finished(FinishReason.STOP, len(script) + 1, FORWARDS * count, count, last.seconds, last.text)


async def test_defaults_are_resolved_before_the_context_sees_them(checkpoint: Path) -> None:
    context = ScriptedContext([7] * 1000)
    async with gateway(checkpoint, context) as running, running.client() as client:
        await _drain(client.generate([5, 6]))
        await _drain(client.generate([5] * (MAX_CONTEXT - 10)))
        await _drain(client.generate([5], block_size=3, ignore_eos=True, max_tokens=7))
        await _drain(
            client.generate([5], mode=Mode.AR, eos_token_ids=[7, 9], seed=2**63 - 1, gamma=0.0, temperature=0.5, steps=2)
        )
    default, long, sized, ar = [request.params for request in context.opened]
    assert (default.mode, default.max_tokens, default.block_size, default.steps) == (
        inference_pb2.MODE_DIFFUSION,
        256,
        BLOCK,
        BLOCK,
    )
    assert (default.gamma, default.temperature, default.seed, list(default.eos_token_ids)) == (0.8, 0.0, 0, [EOS])
    assert list(context.opened[0].prompt.ids) == [5, 6]
    assert context.opened[0].generated == 0
    assert long.max_tokens == 10
    assert (sized.block_size, sized.steps, list(sized.eos_token_ids), sized.max_tokens) == (3, 3, [], 7)
    assert (ar.mode, ar.seed, ar.gamma, ar.temperature, ar.steps) == (inference_pb2.MODE_AR, 2**63 - 1, 0.0, 0.5, 2)
    assert list(ar.eos_token_ids) == [7, 9]


async def test_max_tokens_need_be_no_multiple_of_the_block(checkpoint: Path) -> None:
    async with gateway(checkpoint, ScriptedContext(range(10, 40))) as running, running.client() as client:
        _, blocks, last = split([event async for event in client.generate([5], max_tokens=6)])
    assert [block.token_ids for block in blocks] == [(10, 11, 12, 13), (14, 15)]
    assert (last.finish_reason, last.completion_tokens, last.blocks) == (FinishReason.LENGTH, 6, 2)


async def test_ar_streams_token_by_token(checkpoint: Path) -> None:
    async with gateway(checkpoint, ScriptedContext([10, 11, EOS]), denoisers=1) as running, running.client() as client:
        running.replicas.denoisers.clear()  # not needed
        _, blocks, last = split([event async for event in client.generate([5], mode=Mode.AR)])
    assert [block.token_ids for block in blocks] == [(10,), (11,), (EOS,)]
    assert (last.forwards, last.finish_reason) == (3, FinishReason.STOP)


async def test_a_larger_block_works_and_warns(checkpoint: Path) -> None:
    async with gateway(checkpoint, ScriptedContext([7] * 40)) as running, running.client() as client:
        first, blocks, _ = split([event async for event in client.generate([5], max_tokens=10, block_size=8)])
    assert "block_size 8 is above the 4" in first.warnings[0]
    assert [len(block.token_ids) for block in blocks] == [8, 2]


@pytest.mark.parametrize("size", [1, 3, 4, 7, 16])
@pytest.mark.parametrize(
    ("stop", "expected"), [(["fox"], "then the quick brown "), (["日本", "🙂"], "then the quick brown fox jumps over größer ")]
)
async def test_a_stop_string_ends_the_generation(
    checkpoint: Path, tokenizer: Tokenizer, size: int, stop: list[str], expected: str
) -> None:
    context = ScriptedContext(tokenizer.encode(TEXT) + [7] * 500)
    async with gateway(checkpoint, context) as running, running.client() as client:
        _, blocks, last = split([event async for event in client.generate("x", block_size=size, stop=stop)])
        assert context.running == 0 or await context.left.wait()
    assert text_of(blocks, last) == expected
    assert last.finish_reason is FinishReason.STOP
    assert last.completion_tokens == len(ids_of(blocks)) < 100
    assert ids_of(blocks) == context.script[: last.completion_tokens]


async def test_text_that_only_began_a_stop_string_comes_at_the_end(checkpoint: Path, tokenizer: Tokenizer) -> None:
    async with gateway(checkpoint, ScriptedContext([*tokenizer.encode("a STO"), EOS])) as running, running.client() as client:
        _, blocks, last = split([event async for event in client.generate("x", stop=["STOP"])])
    assert "".join(block.text for block in blocks) == "a "
    assert last.text == "STO"


async def test_special_tokens_never_show(checkpoint: Path, tokenizer: Tokenizer) -> None:
    ids = [1, *tokenizer.encode("ab"), 3, 0, EOS]
    async with gateway(checkpoint, ScriptedContext(ids)) as running, running.client() as client:
        _, blocks, last = split([event async for event in client.generate([EOS, 3], max_tokens=6, ignore_eos=True)])
    assert ids_of(blocks) == ids
    assert text_of(blocks, last) == "ab"


async def test_a_checkpoint_without_tokenizer_takes_ids(bare_checkpoint: Path) -> None:
    async with gateway(bare_checkpoint, ScriptedContext([7] * 9)) as running, running.client() as client:
        _, blocks, last = split([event async for event in client.generate([5], max_tokens=5)])
        assert ids_of(blocks) == [7] * 5
        assert text_of(blocks, last) == ""
        with pytest.raises(InvalidArgument, match="prompt: this checkpoint has no tokenizer: send token ids"):
            await _drain(client.generate("text"))
        with pytest.raises(InvalidArgument, match="stop: this checkpoint has no tokenizer"):
            await _drain(client.generate([5], stop=["x"]))
        assert not (await client.model()).has_tokenizer


BAD: list[tuple[str, dict[str, Any]]] = [
    ("prompt", {"prompt": ""}),
    ("prompt", {"prompt": []}),
    ("prompt", {"prompt": [5, 320]}),
    ("prompt", {"prompt": [-1]}),
    ("max_tokens", {"max_tokens": 0}),
    ("max_tokens", {"max_tokens": -3}),
    ("max_tokens", {"max_tokens": MAX_CONTEXT}),
    ("prompt", {"prompt": [5] * MAX_CONTEXT}),
    ("block_size", {"block_size": 0}),
    ("block_size", {"block_size": 257}),
    ("steps", {"steps": 0}),
    ("gamma", {"gamma": 1.5}),
    ("gamma", {"gamma": float("nan")}),
    ("temperature", {"temperature": -1.0}),
    ("temperature", {"temperature": float("inf")}),
    ("seed", {"seed": -1}),
    ("eos_token_ids", {"eos_token_ids": [320]}),
    ("stop", {"stop": [""]}),
    ("stop", {"stop": ["x"] * 17}),
    ("stop", {"stop": ["x" * 1025]}),
    ("ignore_eos", {"ignore_eos": True, "eos_token_ids": [2]}),
    ("logprobs", {"logprobs": 6}),
    ("logprobs", {"logprobs": -1}),
]


async def test_bad_requests_name_their_field_and_reach_no_context(checkpoint: Path) -> None:
    context = ScriptedContext([7] * 9)
    async with gateway(checkpoint, context) as running, running.client() as client:
        for field, arguments in BAD:
            with pytest.raises(InvalidArgument) as caught:
                await _drain(client.generate(**{"prompt": [5], **arguments}))
            assert caught.value.field == field, arguments
    assert context.opened == []


async def test_messages_that_our_client_would_not_send(checkpoint: Path) -> None:
    async with gateway(checkpoint, ScriptedContext([7])) as running, open_channel(running.grpc) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        prompt = inference_pb2.TokenIds(ids=[5])
        for field, request in [
            ("prompt", inference_pb2.GenerateRequest()),
            ("mode", inference_pb2.GenerateRequest(token_ids=prompt, mode=7)),  # type: ignore[arg-type]
        ]:
            with pytest.raises(Exception, match=rf"{field}: "):
                await stub.Generate(request).read()
        unset = stub.Generate(inference_pb2.GenerateRequest(token_ids=prompt, max_tokens=1))
        assert (await unset.read()).HasField("accepted")  # MODE_UNSPECIFIED is diffusion
        unset.cancel()


async def test_a_mode_of_one_process_is_refused_by_the_client(checkpoint: Path) -> None:
    async with gateway(checkpoint, ScriptedContext([7])) as running, running.client() as client:
        with pytest.raises(InvalidArgument, match="mode: mock-ar"):
            await _drain(client.generate([5], mode=Mode.MOCK_AR))


async def test_the_model_and_its_limits(checkpoint: Path) -> None:
    async with gateway(checkpoint, ScriptedContext([7])) as running, running.client() as client:
        model = await client.model()
    assert (model.model, model.vocab_size, model.max_context, model.block_size) == ("tiny", 320, MAX_CONTEXT, BLOCK)
    assert model.has_tokenizer
    assert len(model.checkpoint_id) >= 16


async def test_without_a_denoiser_only_ar_is_served(checkpoint: Path) -> None:
    context = ScriptedContext([7, EOS])
    async with gateway(checkpoint, context, reopen_wait_s=0.2) as running, running.client() as client:
        running.replicas.denoisers.clear()
        await _until_refused(client)
        with pytest.raises(Unavailable, match=r"no denoiser is live.*mode \"ar\" works.*within 0.2 s"):
            await _drain(client.generate([5]))
        await _drain(client.generate([5], mode=Mode.AR))
        await _drain(client.generate([5], mode=Mode.SPECULATIVE))


async def _until_refused(client: Any) -> None:
    while True:
        try:
            await _drain(client.generate([5], max_tokens=1))
        except Unavailable:
            return


async def _drain(events: Any) -> list[Event]:
    return [event async for event in events]


async def test_a_priority_reaches_the_context(checkpoint: Path) -> None:
    context = ScriptedContext([5, 6, EOS])
    async with gateway(checkpoint, context) as running, running.client() as client:
        for priority in Priority:
            _ = [event async for event in client.generate([5], priority=priority)]
        _ = [event async for event in client.generate([5])]
        with pytest.raises(InvalidArgument, match=r"^priority: 9 is unknown"):
            request_from_pb(inference_pb2.GenerateRequest(text="fox", priority=9), MAX_CONTEXT)  # type: ignore[arg-type]
    assert [PRIORITY_FROM_PB[call.priority] for call in context.opened] == [*Priority, Priority.NORMAL]
