"""A request's body as JSON. What would take long to parse, whatever its size, is refused unparsed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Never

from twotower.errors import InvalidArgument

MAX_VALUES = 2**19
"""Values in a body: token ids, mostly. Parsing as many takes some tens of milliseconds, in which nothing else runs."""

MAX_DIGITS = 640
"""Of an integer: more take time that grows with their square. (The least that Python lets one set.)"""


def parse_json(body: bytes | bytearray) -> Mapping[str, Any]:
    """The JSON object in `body`. Raises InvalidArgument."""
    if _separators(body) > MAX_VALUES and not _few_outside_strings(body):
        raise InvalidArgument("body", f"holds more than {MAX_VALUES} values")
    try:
        value = json.loads(body, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise InvalidArgument("body", f"is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise InvalidArgument("body", f"must be a JSON object, not {kind_of(value)}")
    return value


def kind_of(value: Any) -> str:
    """How JSON calls what this is."""
    names: dict[type, str] = {str: "a string", bool: "a boolean", list: "a list", dict: "an object", type(None): "null"}
    return names.get(type(value)) or f"the number {str(value)[:40]}"


def _separators(body: bytes | bytearray) -> int:
    """At least as many as there are values, within two."""
    return body.count(b",") + body.count(b"[") + body.count(b"{")


def _few_outside_strings(body: bytes | bytearray) -> bool:
    """Whether the separators that are no part of a string are few. Right for valid JSON; what is not will not parse."""
    plain = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    if plain.count(b'"') > 2 * MAX_VALUES:
        return False
    return _separators(b"".join(plain.split(b'"')[::2])) <= MAX_VALUES


def _refuse_constant(name: str) -> Never:
    raise ValueError(f"{name} is no JSON number")
