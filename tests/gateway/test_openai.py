"""The body of a completion request: what is taken, and that what is not names its field."""

from __future__ import annotations

import json
from typing import Any

import pytest

from twotower.errors import InvalidArgument
from twotower.gateway.json_body import parse_json
from twotower.gateway.openai import DEFAULT_MAX_TOKENS, parse_completion
from twotower.gateway.openai_fields import Call
from twotower.gateway.request import Request
from twotower.request import Mode, Priority

MAX_REQUESTS = 64


def parse(**fields: Any) -> Call:
    return parse_completion(parse_json(json.dumps({"prompt": "x", **fields}).encode()), MAX_REQUESTS)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("text", ["text"]),
        (["one", "two"], ["one", "two"]),
        ([1, 2, 3.0], [(1, 2, 3)]),
        ([[1], [2, 3]], [(1,), (2, 3)]),
        ([[]], [()]),  # the core refuses it: it is empty
        ("", [""]),
    ],
)
def test_forms_of_a_prompt(prompt: Any, expected: list[Any]) -> None:
    assert [request.prompt for request in parse(prompt=prompt).requests] == expected


def test_all_fields() -> None:
    call = parse(
        model="m", max_tokens=3.0, temperature=1, seed=7, stop=["a", "b"], stream=True, user="u", top_p=0.9, top_k=5,
        stream_options={"include_usage": True, "include_obfuscation": False},
        mode="ar", gamma=0.5, block_size=8, steps=4, eos_token_ids=[5], timeout_s=2.5, service_tier="flex", logprobs=5,
    )  # fmt: skip
    request = Request(
        "x", DEFAULT_MAX_TOKENS, Mode.AR, 3, 8, 4, 0.5, 1.0, 5, 0.9, 7, ("a", "b"),
        eos_token_ids=(5,), priority=Priority.LOW, logprobs=5,
    )  # fmt: skip
    assert call == Call(
        (request,),
        n=1,
        model="m",
        stream=True,
        include_usage=True,
        continuous_usage=False,
        timeout_s=2.5,
        logprobs=5,
        details=False,
    )
    assert isinstance(call.requests[0].max_tokens, int)


def test_absent_and_null_are_the_same() -> None:
    names = ("model", "max_tokens", "temperature", "seed", "stop", "stream", "stream_options", "user", "mode", "gamma", "steps")
    neutral = ("n", "best_of", "echo", "logprobs", "suffix", "top_p", "presence_penalty", "frequency_penalty", "logit_bias")
    assert parse(**dict.fromkeys((*names, *neutral, "block_size", "ignore_eos", "eos_token_ids"))) == parse()
    assert parse().requests == (Request("x", DEFAULT_MAX_TOKENS),)


@pytest.mark.parametrize(("prompt", "n"), [(["a"] * 65, 1), ([[1]] * 9, 8)])
def test_too_many_texts_at_once_are_refused_before_any_is_made(prompt: list[Any], n: int) -> None:
    with pytest.raises(InvalidArgument, match=r"^prompt: .* this gateway takes 64"):
        parse(prompt=prompt, n=n)


def test_choices_follow_their_prompt_and_differ_by_seed() -> None:
    requests = parse(prompt=["a", "b"], n=3, seed=7).requests
    assert [(request.prompt, request.seed) for request in requests] == [(p, s) for p in "ab" for s in (7, 8, 9)]
    assert [request.seed for request in parse(n=2).requests] == [None, 1]
    assert [request.seed for request in parse(n=2, seed=2**63 - 1).requests] == [2**63 - 1, 0]


def test_neutral_values_of_what_is_not_supported() -> None:
    parse(n=1, best_of=1, echo=False, suffix="", top_p=1.0, presence_penalty=0, frequency_penalty=0.0, logit_bias={})


BAD: list[tuple[str, Any]] = [
    *[("prompt", value) for value in (None, 3, True, {}, [], [1, "a"], [True], [1.5], [["a"]], [[1], 2], [None])],
    *[("max_tokens", value) for value in (True, "3", 1.5, [], {})],
    *[("temperature", value) for value in (True, "0", [], 10**400)],
    *[("seed", value) for value in (False, "1", 0.5)],
    *[("stop", value) for value in (3, [3], {}, True, [None])],
    *[("stream", value) for value in (1, "true")],
    *[("model", value) for value in (3, ["m"])],
    *[("mode", value) for value in ("mock-ar", "DIFFUSION", 1, "")],
    *[("gamma", value) for value in ("0.5", True)],
    *[("block_size", value) for value in ("4", 4.5, True)],
    *[("steps", value) for value in ("4", 4.5, True)],
    *[("ignore_eos", value) for value in (0, "no")],
    *[("eos_token_ids", value) for value in (2, ["2"], [True], [2.5])],
    *[("n", value) for value in (9, 0, -1, True, "1", 1.5)],
    *[("best_of", value) for value in (3, "1", True)],
    *[("echo", value) for value in ("yes", 0)],
    *[("logprobs", value) for value in (True, "5", 1.5, [])],
    *[("timeout_s", value) for value in (0, -1, "soon", True, 1e18, 1e300)],
    *[("service_tier", value) for value in ("scale", "", 1)],
    ("suffix", "s"),
    *[("top_p", value) for value in ("0.9", True)],
    *[("top_k", value) for value in ("5", 1.5, True)],
    ("presence_penalty", 0.1),
    ("frequency_penalty", -1),
    ("logit_bias", {"50256": -100}),
    ("stream_options", {"include_usage": True}),  # without stream
    *[(name, 1) for name in ("max_output_tokens", "messages", "Prompt", "")],
]


@pytest.mark.parametrize(("field", "value"), BAD, ids=lambda v: str(v)[:30])
def test_what_is_wrong_is_named(field: str, value: Any) -> None:
    with pytest.raises(InvalidArgument) as caught:
        parse(**{field: value})
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("field", "options"),
    [
        ("stream_options", True),
        ("stream_options.include_usage", {"include_usage": 1}),
        ("stream_options.other", {"other": True}),
        ("stream_options.include_obfuscation", {"include_obfuscation": True}),
    ],
)
def test_stream_options(field: str, options: Any) -> None:
    with pytest.raises(InvalidArgument) as caught:
        parse(stream=True, stream_options=options)
    assert caught.value.field == field


def test_a_prompt_is_needed() -> None:
    with pytest.raises(InvalidArgument, match="prompt: is missing"):
        parse_completion({"max_tokens": 3}, MAX_REQUESTS)


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b'"x"', b"\xff", b'{"temperature": NaN}', b'{"seed": Infinity}', b"[" * 100_000, b"1" * 5000],
    ids=lambda body: repr(body[:12]),
)
def test_what_is_no_json_object(body: bytes) -> None:
    with pytest.raises(InvalidArgument, match="body: "):
        parse_json(body)


def test_an_echo_without_anything_behind_it_needs_no_denoiser() -> None:
    call = parse(echo=True, max_tokens=0, logprobs=1)
    assert (call.echo, call.generates, call.logprobs) == (True, False, 1)
    assert (call.requests[0].mode, call.requests[0].max_tokens) == (Mode.AR, 1)
    assert parse(echo=True, max_tokens=1).generates
    assert parse(max_tokens=0).generates  # the core refuses it


def test_details_need_logprobs_that_nobody_else_sees() -> None:
    assert (parse(details=True).logprobs, parse(details=True).requests[0].logprobs) == (None, 0)
    assert (parse(details=True, logprobs=3).logprobs, parse(details=True, logprobs=3).requests[0].logprobs) == (3, 3)
