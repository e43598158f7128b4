"""A request's body as JSON. What would take long to parse, whatever its size, is refused unparsed."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Never

from twotower.errors import InvalidArgument

MAX_VALUES = 300_000
"""Values in a body: token ids, mostly. Parsing as many takes some 15 ms, in which nothing else runs."""

SLICE = 64 * 1024
"""Bytes that are looked at without a pause."""

MAX_DIGITS = 500
"""Of a number: reading an integer takes time that grows with their square."""

_ESCAPED = re.compile("[\udc80-\udcff]")

_LONG_NUMBER = re.compile(rb"[0-9]{%d}" % (MAX_DIGITS + 1))


def parse_json(body: bytes | bytearray) -> Mapping[str, Any]:
    """The JSON object in `body`. Raises InvalidArgument."""
    _check_values(body)
    try:
        value = json.loads(body, parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise InvalidArgument(
            _field_of(body, error), f"is not valid UTF-8: {error.reason} at byte {error.start} of the body"
        ) from None
    except (ValueError, RecursionError) as error:
        raise InvalidArgument("body", f"is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise InvalidArgument("body", f"must be a JSON object, not {kind_of(value)}")
    return value


def kind_of(value: Any) -> str:
    """How JSON calls what this is."""
    names: dict[type, str] = {str: "a string", bool: "a boolean", list: "a list", dict: "an object", type(None): "null"}
    return names.get(type(value)) or f"the number {str(value)[:40]}"


def _check_values(body: bytes | bytearray) -> None:
    """Refuse a body with too much outside its strings. Right for valid JSON; what is not will not parse.

    In slices, between which other threads run.
    """
    values, in_string, escaped = 0, False, False
    for start in range(0, len(body), SLICE):
        piece = bytes(body[start : start + SLICE])
        if escaped:  # by the last byte of the slice before
            piece = b"." + piece[1:]
        escaped = (len(piece) - len(piece.rstrip(b"\\"))) % 2 == 1
        parts = piece.replace(b"\\\\", b"").replace(b'\\"', b"").split(b'"')
        outside = b"".join(parts[in_string::2])
        in_string ^= len(parts) % 2 == 0  # after an odd number of quotes
        values += outside.count(b",") + outside.count(b"[") + outside.count(b"{")
        if values > MAX_VALUES:
            raise InvalidArgument("body", f"holds more than {MAX_VALUES} values")
        if _LONG_NUMBER.search(outside):
            raise InvalidArgument("body", f"holds a number of more than {MAX_DIGITS} digits")


def _field_of(body: bytes | bytearray, error: UnicodeDecodeError) -> str:
    """The field that holds bytes which are no UTF-8; the body itself, where that cannot be said."""
    if error.encoding != "utf-8":
        return "body"
    try:
        value = json.loads(body.decode(errors="surrogateescape"))
    except (ValueError, RecursionError):
        return "body"
    found = (name for name, held in value.items() if _is_broken(held)) if isinstance(value, dict) else iter(())
    return next(found, "body")


def _is_broken(value: Any) -> bool:
    """Whether a string in it holds what `surrogateescape` makes of a byte that is no UTF-8."""
    held = [value]
    while held:
        one = held.pop()
        if isinstance(one, str) and _ESCAPED.search(one):
            return True
        held += one if isinstance(one, list) else one.values() if isinstance(one, dict) else ()
    return False


def _refuse_constant(name: str) -> Never:
    raise ValueError(f"{name} is no JSON number")
