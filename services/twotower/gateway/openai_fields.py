"""Fields of a request's body: taken by type, refused by name. What OpenAI's endpoints have in common."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Never, TypeVar

from twotower.errors import InvalidArgument
from twotower.gateway.json_body import kind_of
from twotower.gateway.request import Request
from twotower.request import MAX_SEED, MAX_TIMEOUT_S, Mode, Priority
from twotower.wire.params import MODE_TO_PB

T = TypeVar("T")

MAX_QUOTE = 100
"""Characters of what a client sent that an error repeats."""

MAX_CHOICES = 8
"""Texts for each prompt."""

TIERS = {"auto": Priority.NORMAL, "default": Priority.NORMAL, "priority": Priority.HIGH, "flex": Priority.LOW}
"""OpenAI's names for who goes first."""

MODES = {mode.value: mode for mode in MODE_TO_PB}
"""What a gateway's clients may ask for: all that travels."""

STREAM_OPTIONS = ("include_usage", "continuous_usage_stats", "include_obfuscation")


@dataclass(frozen=True, slots=True)
class Call:
    """A checked body of an endpoint that generates."""

    requests: tuple[Request, ...]
    """One for each choice: n for each prompt, in order."""
    n: int
    """Choices for each prompt."""
    model: str | None
    stream: bool
    include_usage: bool
    """A stream ends with the usage,"""
    continuous_usage: bool
    """and each of its pieces has the usage so far."""
    timeout_s: float | None
    """How long the call may take."""
    logprobs: int | None
    """As the client asked for it: the requests may ask for more, to fill the details."""
    details: bool
    """With each token's block, step and confidence."""
    echo: bool = False
    """Each choice begins with its prompt, with the prompt's log probabilities if there are any."""
    generates: bool = True
    """Whether anything follows the prompt."""


def check_names(body: Mapping[str, Any], known: Collection[str], neutral: Mapping[str, tuple[Any, ...]], what: str) -> None:
    """Refuse what is not known, and what has meaning and is not supported. Raises InvalidArgument.

    `neutral`: values that ask for nothing, besides null. `what`: whose fields these are.
    """
    for name in body:
        if name not in known and name not in neutral:
            raise InvalidArgument(name[:MAX_QUOTE], f"is not a field of {what}")
    for name, values in neutral.items():
        value = body.get(name)
        if value is not None and not any(value == n and isinstance(value, bool) == isinstance(n, bool) for n in values):
            raise InvalidArgument(name, f"is not supported; leave it out (or give {json.dumps(values[0] if values else None)})")


def generation_fields(body: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a `Request` that all endpoints call by the same names."""
    return {
        "mode": optional(body, "mode", mode) or Mode.DIFFUSION,
        "max_tokens": max_tokens(body),
        "block_size": optional(body, "block_size", integer),
        "steps": optional(body, "steps", integer),
        "gamma": optional(body, "gamma", number),
        "temperature": optional(body, "temperature", number),
        "top_k": optional(body, "top_k", integer),
        "top_p": optional(body, "top_p", number),
        "seed": optional(body, "seed", integer),
        "stop": optional(body, "stop", stop_strings) or (),
        "ignore_eos": optional(body, "ignore_eos", boolean) or False,
        "eos_token_ids": optional(body, "eos_token_ids", token_ids) or (),
        "priority": optional(body, "service_tier", priority) or Priority.NORMAL,
        "show_steps": stream_steps(body),
    }


GENERATION_FIELDS = (
    *("mode", "gamma", "block_size", "steps", "top_k", "ignore_eos", "eos_token_ids", "timeout_s", "details", "stream_steps"),
    *("model", "n", "max_tokens", "max_completion_tokens", "temperature", "top_p", "seed", "stop", "stream", "stream_options"),
    *("service_tier", "logprobs", "user", "metadata"),
)
"""Taken by all endpoints that generate; the first line's are ours."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "min_tokens": (0,),
    "repetition_penalty": (1,),
    "response_format": ({"type": "text"},),
    "prompt_logprobs": (),
    "store": (False,),
}
"""What asks for nothing, besides null."""


def choices(body: Mapping[str, Any]) -> int:
    """How many for each prompt."""
    n = optional(body, "n", integer)
    n = 1 if n is None else n
    if not 1 <= n <= MAX_CHOICES:
        raise InvalidArgument("n", f"must be in [1, {MAX_CHOICES}], not {n}")
    return n


def seeds(seed: int | None, n: int, default: int) -> list[int | None]:
    """One for each of a prompt's choices: the request's, then those that follow."""
    first = default if seed is None else seed
    return [seed, *((first + i) % (MAX_SEED + 1) for i in range(1, n))]


def max_tokens(body: Mapping[str, Any]) -> int | None:
    """Under either of its names."""
    given = {name: optional(body, name, integer) for name in ("max_tokens", "max_completion_tokens")}
    values = {value for value in given.values() if value is not None}
    if len(values) > 1:
        raise InvalidArgument("max_completion_tokens", "contradicts max_tokens: give one of them")
    return next(iter(values), None)


def stream_steps(body: Mapping[str, Any]) -> bool:
    """Whether a stream shows blocks on their way."""
    wanted = optional(body, "stream_steps", boolean) or False
    if wanted and not body.get("stream"):
        raise InvalidArgument("stream_steps", "is only for stream: true")
    return wanted


def stream_options(body: Mapping[str, Any], stream: bool) -> tuple[bool, bool]:
    """Whether a stream ends with its usage, and whether each piece has the usage so far."""
    options = body.get("stream_options")
    if options is None:
        return False, False
    if not isinstance(options, dict):
        refuse("stream_options", "an object", options)
    if options and not stream:
        raise InvalidArgument("stream_options", "is only for stream: true")
    for name in options:
        if name not in STREAM_OPTIONS:
            raise InvalidArgument(f"stream_options.{name[:MAX_QUOTE]}", "is not a field of stream_options")
    given = {name: optional(options, name, boolean, "stream_options.") for name in STREAM_OPTIONS}
    if given["include_obfuscation"]:
        raise InvalidArgument("stream_options.include_obfuscation", "is not supported; leave it out (or give false)")
    return bool(given["include_usage"]), bool(given["continuous_usage_stats"])


def optional(body: Mapping[str, Any], name: str, convert: Callable[[str, Any], T], prefix: str = "") -> T | None:
    """The converted value; None where it is absent or null. `prefix`: of the name in an error."""
    value = body.get(name)
    return None if value is None else convert(prefix + name, value)


def boolean(name: str, value: Any) -> bool:
    """true or false."""
    return value if isinstance(value, bool) else refuse(name, "true or false", value)


def string(name: str, value: Any) -> str:
    """A string."""
    return value if isinstance(value, str) else refuse(name, "a string", value)


def integer(name: str, value: Any) -> int:
    """An integer."""
    if isinstance(value, float) and value.is_integer():
        return int(value)  # JSON knows one kind of number: 3.0 is 3
    return value if isinstance(value, int) and not isinstance(value, bool) else refuse(name, "an integer", value)


def number(name: str, value: Any) -> float:
    """A finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        refuse(name, "a number", value)
    try:
        result = float(value)
    except OverflowError:
        result = math.inf
    if not math.isfinite(result):
        raise InvalidArgument(name, "must be a finite number")
    return result


def mode(name: str, value: Any) -> Mode:
    """One of `MODES`."""
    found = MODES.get(string(name, value))
    if found is None:
        raise InvalidArgument(name, f"must be one of {', '.join(MODES)}, not {value[:MAX_QUOTE]!r}")
    return found


def priority(name: str, value: Any) -> Priority:
    """One of `TIERS`."""
    found = TIERS.get(string(name, value))
    if found is None:
        raise InvalidArgument(name, f"must be one of {', '.join(TIERS)}, not {value[:MAX_QUOTE]!r}")
    return found


def seconds(name: str, value: Any) -> float:
    """How long something may take."""
    result = number(name, value)
    if not 0 < result <= MAX_TIMEOUT_S:
        raise InvalidArgument(name, f"must be in (0, {MAX_TIMEOUT_S}] seconds, not {result:g}")
    return result


def stop_strings(name: str, value: Any) -> tuple[str, ...]:
    """One string, or some."""
    if isinstance(value, list):
        return tuple(string(name, item) for item in value)
    return (string(name, value),)


def token_ids(name: str, value: Any) -> tuple[int, ...]:
    """A list of token ids, in whatever range."""
    if not isinstance(value, list):
        refuse(name, "a list of token ids", value)
    if set(map(type, value)) == {int}:  # the quick way for what may be hundreds of thousands
        return tuple(value)
    return tuple(integer(name, item) for item in value)


def refuse(name: str, wanted: str, value: Any) -> Never:
    """Raise InvalidArgument."""
    raise InvalidArgument(name, f"must be {wanted}, not {kind_of(value)}")
