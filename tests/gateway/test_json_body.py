from __future__ import annotations

import json

import pytest

from twotower.errors import InvalidArgument
from twotower.gateway import json_body
from twotower.gateway.json_body import parse_json
from twotower.gateway.openai import parse_completion


@pytest.fixture(autouse=True)
def few_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_body, "MAX_VALUES", 1000)
    monkeypatch.setattr(json_body, "SLICE", 7)


@pytest.mark.parametrize(
    "body",
    [
        b'{"prompt": [' + b"5," * 1001 + b"5]}",
        b'{"prompt": ' + b"[" * 1001 + b"]" * 1001 + b"}",
        b'{"prompt": ' + b"[]," * 1001 + b"}",
        b'{"prompt": [' + b'"",' * 1001 + b'""]}',
        b'{"prompt": [' + b'"\\"\\\\",' * 1001 + b'""]}',
        b"[" + b"{}," * 1001 + b"{}]",
        b"{" + b'"a":1,' * 1001 + b'"b":1}',
    ],
    ids=["ids", "depth", "lists", "texts", "escapes", "objects", "fields"],
)
def test_millions_of_values_are_refused_unparsed(body: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json, "loads", lambda *args, **kwargs: pytest.fail("it was parsed"))
    with pytest.raises(InvalidArgument, match=r"^body: holds more than 1000 values"):
        parse_json(body)


@pytest.mark.parametrize(
    "text",
    [
        "a,b" * 11000,
        "[{" * 11000,
        'say "no", ' * 2000,
        "\\" * 11001 + ",",
        '\\",' * 11000,
        ',"' * 1500,
        "\\\\,\\" * 3000,
        "日本,語🙂" * 2000,
    ],
)
@pytest.mark.parametrize("ensure_ascii", [False, True])
def test_a_text_may_contain_anything(text: str, ensure_ascii: bool) -> None:
    body = json.dumps({"prompt": text, "stop": [text]}, ensure_ascii=ensure_ascii).encode()
    assert parse_json(body) == {"prompt": text, "stop": [text]}


@pytest.mark.parametrize("number", [b"9" * 1100, b"-" + b"1" * 1100, b"0." + b"0" * 1100 + b"1", b"1e" + b"1" * 1100])
def test_a_number_of_many_digits_is_refused_unparsed(number: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_body, "SLICE", 1024)
    assert parse_json(b'{"prompt": "%s"}' % number) == {"prompt": number.decode()}
    monkeypatch.setattr(json, "loads", lambda *args, **kwargs: pytest.fail("it was parsed"))
    with pytest.raises(InvalidArgument, match=r"^body: holds a number of more than 500 digits"):
        parse_json(b'{"max_tokens": %s}' % number)


def test_a_thousand_values_are_taken() -> None:
    ids = list(range(990))
    assert parse_json(json.dumps({"prompt": ids}).encode()) == {"prompt": ids}
    assert parse_completion({"prompt": ids}, 1).requests[0].prompt == tuple(ids)


def test_whole_numbers_are_integers_and_nothing_else_is() -> None:
    assert parse_completion({"prompt": [5, 6.0]}, 1).requests[0].prompt == (5, 6)
    for bad in (True, 5.5, None):
        with pytest.raises(InvalidArgument, match=r"^prompt: must be an integer"):
            parse_completion({"prompt": [5, bad]}, 1)


def test_errors_repeat_little_of_what_was_sent() -> None:
    long = "x" * 100_000
    for body in ({"prompt": "a", long: 1}, {"prompt": "a", "mode": long}, {"prompt": "a", "service_tier": long}):
        with pytest.raises(InvalidArgument) as caught:
            parse_completion(body, 1)
        assert len(str(caught.value)) < 1000
