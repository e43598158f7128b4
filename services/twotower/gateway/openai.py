"""The body of `POST /v1/completions`, as OpenAI defines it plus our own fields: JSON in, Requests out.

Every field is known here: one that is not is refused by name, and one that this server cannot honour is
taken only at the value that asks for nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from twotower.errors import InvalidArgument
from twotower.gateway.openai_fields import (
    GENERATION_FIELDS,
    NEUTRAL,
    Call,
    boolean,
    check_names,
    choices,
    generation_fields,
    integer,
    optional,
    refuse,
    seconds,
    seeds,
    stream_options,
    string,
    token_ids,
)
from twotower.gateway.request import DEFAULT_SEED, Request
from twotower.request import Mode

DEFAULT_MAX_TOKENS = 16
"""OpenAI's."""

KNOWN = frozenset((*GENERATION_FIELDS, "prompt", "best_of", "echo"))
COMPLETION_NEUTRAL = {"suffix": ("",), **NEUTRAL}


def parse_completion(body: Mapping[str, Any], max_requests: int) -> Call:
    """Check types and names, not yet ranges (the core does). Raises InvalidArgument, which names the field."""
    check_names(body, KNOWN, COMPLETION_NEUTRAL, "a completion request")
    stream = optional(body, "stream", boolean) or False
    include_usage, continuous_usage = stream_options(body, stream)
    fields = generation_fields(body)
    logprobs, details = optional(body, "logprobs", integer), optional(body, "details", boolean) or False
    echo = optional(body, "echo", boolean) or False
    generates = not (echo and fields["max_tokens"] == 0)
    if not generates:  # only what is known of the prompt is wanted, and the context tower knows it
        fields |= {"max_tokens": 1, "mode": Mode.AR}
    if "prompt" not in body:
        raise InvalidArgument("prompt", "is missing")
    n = choices(body)
    if (best_of := optional(body, "best_of", integer)) not in (None, n):
        raise InvalidArgument("best_of", f"must be n, which is {n}, not {best_of}: all texts are given")
    prompts = _prompts(body["prompt"])
    if len(prompts) * n > max_requests:
        raise InvalidArgument(
            "prompt", f"{len(prompts)} prompts of {n} choices at once; this gateway takes {max_requests} texts"
        )
    fields["logprobs"] = 0 if details and logprobs is None else logprobs
    return Call(
        requests=tuple(
            dataclasses.replace(request, seed=seed)
            for request in (Request(prompt, DEFAULT_MAX_TOKENS, **fields) for prompt in prompts)
            for seed in seeds(request.seed, n, DEFAULT_SEED)
        ),
        n=n,
        model=optional(body, "model", string),
        stream=stream,
        include_usage=include_usage,
        continuous_usage=continuous_usage,
        timeout_s=optional(body, "timeout_s", seconds),
        logprobs=logprobs,
        details=details,
        echo=echo,
        generates=generates,
    )


def _prompts(value: Any) -> list[str | tuple[int, ...]]:
    """One text, some texts, one sequence of ids, or some of them."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        refuse("prompt", "a string, or a list of strings or of token ids", value)
    if not value:
        raise InvalidArgument("prompt", "is empty; at least one token is needed")
    if all(isinstance(item, str) for item in value):
        return list(value)
    if all(isinstance(item, list) for item in value):
        return [token_ids("prompt", item) for item in value]
    return [token_ids("prompt", value)]
