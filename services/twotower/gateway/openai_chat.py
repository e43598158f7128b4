"""The body of `POST /v1/chat/completions`: messages become a prompt by the checkpoint's own template."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from twotower.errors import InvalidArgument
from twotower.gateway.core import ServedModel
from twotower.gateway.openai_fields import (
    GENERATION_FIELDS,
    MAX_QUOTE,
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
)
from twotower.gateway.request import DEFAULT_SEED, Request
from twotower.request import MAX_LOGPROBS

DEFAULT_MAX_TOKENS = 256
"""gRPC's; OpenAI's is what the context holds, and each request reserves memory for all that it may become."""

MAX_MESSAGES = 4096

ROLES = ("system", "developer", "user", "assistant")

KNOWN = frozenset((*GENERATION_FIELDS, "messages", "top_logprobs", "safety_identifier", "prompt_cache_key"))
CHAT_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
    **NEUTRAL,
}


def parse_chat(body: Mapping[str, Any], model: ServedModel, max_requests: int) -> Call:
    """Check types and names, and render the prompt; ranges are checked by the core.

    Raises InvalidArgument, which names the field.
    """
    if model.chat is None:
        raise InvalidArgument(
            "messages", "this checkpoint brings no chat template, so that it takes no chats; send a prompt to /v1/completions"
        )
    check_names(body, KNOWN, CHAT_NEUTRAL, "a chat completion request")
    stream = optional(body, "stream", boolean) or False
    include_usage, continuous_usage = stream_options(body, stream)
    fields, n = generation_fields(body), choices(body)
    logprobs, details = _logprobs(body), optional(body, "details", boolean) or False
    if n > max_requests:
        raise InvalidArgument("n", f"{n} choices at once; this gateway takes {max_requests} texts")
    prompt = model.chat.render(parse_messages(body))
    fields |= {"logprobs": 0 if details and logprobs is None else logprobs, "special_tokens": False}
    request = Request(prompt, DEFAULT_MAX_TOKENS, **fields)
    return Call(
        requests=tuple(dataclasses.replace(request, seed=seed) for seed in seeds(request.seed, n, DEFAULT_SEED)),
        n=n,
        model=optional(body, "model", string),
        stream=stream,
        include_usage=include_usage,
        continuous_usage=continuous_usage,
        timeout_s=optional(body, "timeout_s", seconds),
        logprobs=logprobs,
        details=details,
    )


def parse_messages(body: Mapping[str, Any]) -> Sequence[Mapping[str, str]]:
    """The messages as a template takes them: each with a role, its text, and perhaps a name. Raises InvalidArgument."""
    messages = body.get("messages")
    if messages is None:
        raise InvalidArgument("messages", "is missing")
    if not isinstance(messages, list):
        refuse("messages", "a list of messages", messages)
    if not 1 <= len(messages) <= MAX_MESSAGES:
        raise InvalidArgument("messages", f"must be 1 to {MAX_MESSAGES} messages, not {len(messages)}")
    return [_message(f"messages[{i}]", message) for i, message in enumerate(messages)]


def _message(name: str, message: Any) -> Mapping[str, str]:
    if not isinstance(message, dict):
        refuse(name, "an object", message)
    for field, value in message.items():
        if field not in ("role", "content", "name") and value not in (None, [], ""):
            raise InvalidArgument(f"{name}.{field[:MAX_QUOTE]}", "is not supported; leave it out")
    role = string(f"{name}.role", message.get("role"))
    if role not in ROLES:
        raise InvalidArgument(f"{name}.role", f"must be one of {', '.join(ROLES)}, not {role[:MAX_QUOTE]!r}")
    taken = {"role": role, "content": _content(f"{name}.content", message.get("content"))}
    if (speaker := optional(message, "name", string, f"{name}.")) is not None:
        taken["name"] = speaker
    for field, text in taken.items():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            problem = f"is not valid Unicode: {error.reason} at position {error.start}"
            raise InvalidArgument(f"{name}.{field}", problem) from None
    return taken


def _content(name: str, content: Any) -> str:
    """A text, or the texts of its parts, one behind the other."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        refuse(name, "a string, or a list of text parts", content)
    texts = []
    for i, part in enumerate(content):
        if not isinstance(part, dict):
            refuse(f"{name}[{i}]", "an object", part)
        if part.get("type") != "text":
            raise InvalidArgument(f"{name}[{i}].type", "must be text: this model reads nothing else")
        texts.append(string(f"{name}[{i}].text", part.get("text")))
    return "".join(texts)


def _logprobs(body: Mapping[str, Any]) -> int | None:
    """How many of the likeliest tokens at each place; None: no log probabilities at all."""
    wanted, top = optional(body, "logprobs", boolean), optional(body, "top_logprobs", integer)
    if not wanted:
        if top:
            raise InvalidArgument("top_logprobs", "is only for logprobs: true")
        return None
    if not 0 <= (top or 0) <= MAX_LOGPROBS:
        raise InvalidArgument("top_logprobs", f"must be in [0, {MAX_LOGPROBS}], not {top}")
    return top or 0
