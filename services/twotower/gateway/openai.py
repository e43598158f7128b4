"""The body of `POST /v1/completions`, as OpenAI defines it plus our own fields: JSON in, Requests out.

Every field is known here: one that is not is refused by name, and one that this server cannot honour is
taken only at the value that asks for nothing.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Never, TypeVar

from twotower.errors import InvalidArgument
from twotower.gateway.json_body import kind_of
from twotower.gateway.request import DEFAULT_SEED, Request
from twotower.request import MAX_SEED, MAX_TIMEOUT_S, Mode, Priority

T = TypeVar("T")

DEFAULT_MAX_TOKENS = 16
"""OpenAI's."""

MAX_QUOTE = 100
"""Characters of what a client sent that an error repeats."""

MAX_CHOICES = 8
"""Texts for each prompt."""

TIERS = {"auto": Priority.NORMAL, "default": Priority.NORMAL, "priority": Priority.HIGH, "flex": Priority.LOW}
"""OpenAI's names for who goes first."""

MODES = {mode.value: mode for mode in (Mode.DIFFUSION, Mode.AR, Mode.SPECULATIVE)}


@dataclass(frozen=True, slots=True)
class CompletionCall:
    """A checked body."""

    requests: tuple[Request, ...]
    """One for each choice: n for each prompt, in order."""
    n: int
    """Choices for each prompt."""
    model: str | None
    stream: bool
    include_usage: bool
    timeout_s: float | None
    """How long the call may take."""


def parse_completion(body: Mapping[str, Any], max_requests: int) -> CompletionCall:
    """Check types and names, not yet ranges (the core does). Raises InvalidArgument, which names the field."""
    for name in body:
        if name not in _KNOWN:
            raise InvalidArgument(name[:MAX_QUOTE], "is not a field of a completion request")
    for name, neutral in _NEUTRAL.items():
        value = body.get(name)
        if value is not None and not any(value == n and isinstance(value, bool) == isinstance(n, bool) for n in neutral):
            raise InvalidArgument(
                name, f"is not supported; leave it out (or give {json.dumps(neutral[0] if neutral else None)})"
            )
    stream = _optional(body, "stream", _boolean) or False
    eos_token_ids = _optional(body, "eos_token_ids", _token_ids)
    fields: dict[str, Any] = {
        "mode": _optional(body, "mode", _mode) or Mode.DIFFUSION,
        "max_tokens": _max_tokens(body),
        "block_size": _optional(body, "block_size", _integer),
        "steps": _optional(body, "steps", _integer),
        "gamma": _optional(body, "gamma", _number),
        "temperature": _optional(body, "temperature", _number),
        "top_k": _optional(body, "top_k", _integer),
        "top_p": _optional(body, "top_p", _number),
        "seed": _optional(body, "seed", _integer),
        "stop": _optional(body, "stop", _stop) or (),
        "ignore_eos": _optional(body, "ignore_eos", _boolean) or False,
        "eos_token_ids": eos_token_ids or (),
        "logprobs": _optional(body, "logprobs", _integer),
        "priority": _optional(body, "service_tier", _priority) or Priority.NORMAL,
    }
    if "prompt" not in body:
        raise InvalidArgument("prompt", "is missing")
    n = _optional(body, "n", _integer)
    n = 1 if n is None else n
    if not 1 <= n <= MAX_CHOICES:
        raise InvalidArgument("n", f"must be in [1, {MAX_CHOICES}], not {n}")
    if (best_of := _optional(body, "best_of", _integer)) not in (None, n):
        raise InvalidArgument("best_of", f"must be n, which is {n}, not {best_of}: all texts are given")
    prompts = _prompts(body["prompt"])
    if len(prompts) * n > max_requests:
        raise InvalidArgument(
            "prompt", f"{len(prompts)} prompts of {n} choices at once; this gateway takes {max_requests} texts"
        )
    return CompletionCall(
        requests=tuple(
            dataclasses.replace(request, seed=seed)
            for request in (Request(prompt, DEFAULT_MAX_TOKENS, **fields) for prompt in prompts)
            for seed in _seeds(request.seed, n)
        ),
        n=n,
        model=_optional(body, "model", _string),
        stream=stream,
        include_usage=_include_usage(body, stream),
        timeout_s=_optional(body, "timeout_s", _seconds),
    )


_OURS = ("mode", "gamma", "block_size", "steps", "top_k", "ignore_eos", "eos_token_ids", "timeout_s")
_TAKEN = (
    *("model", "prompt", "n", "best_of", "max_tokens", "temperature", "top_p", "seed", "stop", "stream", "stream_options"),
    *("logprobs", "service_tier", "max_completion_tokens"),
)
_IGNORED = ("user", "metadata")
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "echo": (False,),
    "suffix": ("",),
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

_KNOWN = frozenset((*_OURS, *_TAKEN, *_IGNORED, *_NEUTRAL))


def _seeds(seed: int | None, n: int) -> list[int | None]:
    """One for each of a prompt's choices: the request's, then those that follow."""
    first = DEFAULT_SEED if seed is None else seed
    return [seed, *((first + i) % (MAX_SEED + 1) for i in range(1, n))]


def _prompts(value: Any) -> list[str | tuple[int, ...]]:
    """One text, some texts, one sequence of ids, or some of them."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        _refuse("prompt", "a string, or a list of strings or of token ids", value)
    if not value:
        raise InvalidArgument("prompt", "is empty; at least one token is needed")
    if all(isinstance(item, str) for item in value):
        return list(value)
    if all(isinstance(item, list) for item in value):
        return [_token_ids("prompt", item) for item in value]
    return [_token_ids("prompt", value)]


def _max_tokens(body: Mapping[str, Any]) -> int | None:
    """Under either of its names."""
    given = {name: _optional(body, name, _integer) for name in ("max_tokens", "max_completion_tokens")}
    values = {value for value in given.values() if value is not None}
    if len(values) > 1:
        raise InvalidArgument("max_completion_tokens", "contradicts max_tokens: give one of them")
    return next(iter(values), None)


def _include_usage(body: Mapping[str, Any], stream: bool) -> bool:
    options = body.get("stream_options")
    if options is None:
        return False
    if not isinstance(options, dict):
        _refuse("stream_options", "an object", options)
    if options and not stream:
        raise InvalidArgument("stream_options", "is only for stream: true")
    for name in options:
        if name not in ("include_usage", "include_obfuscation", "continuous_usage_stats"):
            raise InvalidArgument(f"stream_options.{name[:MAX_QUOTE]}", "is not a field of stream_options")
    for name in ("include_obfuscation", "continuous_usage_stats"):
        if _optional(options, name, _boolean):
            raise InvalidArgument(f"stream_options.{name}", "is not supported; leave it out (or give false)")
    return _optional(options, "include_usage", _boolean) or False


def _optional(body: Mapping[str, Any], name: str, convert: Callable[[str, Any], T]) -> T | None:
    """The converted value; None where it is absent or null."""
    value = body.get(name)
    return None if value is None else convert(name, value)


def _boolean(name: str, value: Any) -> bool:
    return value if isinstance(value, bool) else _refuse(name, "true or false", value)


def _string(name: str, value: Any) -> str:
    return value if isinstance(value, str) else _refuse(name, "a string", value)


def _integer(name: str, value: Any) -> int:
    if isinstance(value, float) and value.is_integer():
        return int(value)  # JSON knows one kind of number: 3.0 is 3
    return value if isinstance(value, int) and not isinstance(value, bool) else _refuse(name, "an integer", value)


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        _refuse(name, "a number", value)
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise InvalidArgument(name, "must be a finite number")
    return number


def _mode(name: str, value: Any) -> Mode:
    mode = MODES.get(_string(name, value))
    if mode is None:
        raise InvalidArgument(name, f"must be one of {', '.join(MODES)}, not {value[:MAX_QUOTE]!r}")
    return mode


def _priority(name: str, value: Any) -> Priority:
    priority = TIERS.get(_string(name, value))
    if priority is None:
        raise InvalidArgument(name, f"must be one of {', '.join(TIERS)}, not {value[:MAX_QUOTE]!r}")
    return priority


def _seconds(name: str, value: Any) -> float:
    seconds = _number(name, value)
    if not 0 < seconds <= MAX_TIMEOUT_S:
        raise InvalidArgument(name, f"must be in (0, {MAX_TIMEOUT_S}] seconds, not {seconds:g}")
    return seconds


def _stop(name: str, value: Any) -> tuple[str, ...]:
    if isinstance(value, list):
        return tuple(_string(name, item) for item in value)
    return (_string(name, value),)


def _token_ids(name: str, value: Any) -> tuple[int, ...]:
    if not isinstance(value, list):
        _refuse(name, "a list of token ids", value)
    if set(map(type, value)) == {int}:  # the quick way for what may be hundreds of thousands
        return tuple(value)
    return tuple(_integer(name, item) for item in value)


def _refuse(name: str, wanted: str, value: Any) -> Never:
    raise InvalidArgument(name, f"must be {wanted}, not {kind_of(value)}")
