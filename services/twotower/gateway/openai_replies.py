"""OpenAI's reply bodies: completions, chunks of a stream, models, errors."""

from __future__ import annotations

import dataclasses
from typing import Any

from twotower.errors import InvalidArgument, TwoTowerError
from twotower.events import Block, Finished
from twotower.gateway.core import ServedModel
from twotower.request import NO_DRAFT
from twotower.status import status_of


class Totals:
    """Usage of one call, over all its prompts."""

    def __init__(self) -> None:
        self._prompt_tokens = 0
        self._completion_tokens = 0
        self._forwards = 0
        self._rounds = 0
        self._use = NO_DRAFT

    def accept(self, prompt_tokens: int) -> None:
        """A prompt was accepted."""
        self._prompt_tokens += prompt_tokens

    def finish(self, finished: Finished) -> None:
        """One of the generations ended."""
        self._completion_tokens += finished.completion_tokens
        self._forwards += finished.forwards
        self._rounds += finished.rounds
        self._use += finished.use

    def body(self) -> dict[str, Any]:
        """`usage`; what OpenAI calls a prediction is a draft, and forwards and rounds are ours."""
        use = self._use
        drafts = {
            "rounds": self._rounds,
            "context_forwards": use.context_forwards,
            "completion_tokens_details": {
                "accepted_prediction_tokens": use.accepted,
                "rejected_prediction_tokens": use.drafted - use.accepted,
            },
        }
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": self._completion_tokens,
            "total_tokens": self._prompt_tokens + self._completion_tokens,
            "forwards": self._forwards,
            **(drafts if use != NO_DRAFT else {}),
        }


class CompletionReply:
    """The replies of one call."""

    def __init__(self, request_id: str, created: int, model: str) -> None:
        self._head = {"id": f"cmpl-{request_id}", "object": "text_completion", "created": created, "model": model}

    def whole(self, choices: list[dict[str, Any]], usage: dict[str, Any], warnings: list[str]) -> dict[str, Any]:
        """The reply that is no stream."""
        return {**self._head, "choices": choices, "usage": usage, **_if_any(warnings)}

    def chunk(self, item: dict[str, Any], with_usage: bool, warnings: list[str]) -> dict[str, Any]:
        """One piece of a stream. `with_usage`: the stream will end with the usage, so that each piece has the key."""
        return {**self._head, "choices": [item], **({"usage": None} if with_usage else {}), **_if_any(warnings)}

    def usage_chunk(self, usage: dict[str, Any]) -> dict[str, Any]:
        """The last piece of a stream that was asked for usage."""
        return {**self._head, "choices": [], "usage": usage}


def choice(
    index: int, text: str, token_ids: tuple[int, ...], finish_reason: str | None, logprobs: dict[str, Any] | None
) -> dict[str, Any]:
    """An element of `choices`; token_ids are ours."""
    return {"index": index, "text": text, "finish_reason": finish_reason, "logprobs": logprobs, "token_ids": list(token_ids)}


def event_choice(index: int, event: Block | Finished, logprobs: dict[str, Any] | None) -> dict[str, Any]:
    """The element that tells of an event."""
    if isinstance(event, Block):
        drafts = {"draft": dataclasses.asdict(event.use)} if event.use != NO_DRAFT else {}
        return {**choice(index, event.text, event.token_ids, None, logprobs), "forwards": event.forwards, **drafts}
    return choice(index, event.text, (), event.finish_reason.value, logprobs)


def model_body(model: ServedModel) -> dict[str, Any]:
    """An element of `/v1/models`; what follows `owned_by` is ours."""
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "twotower",
        "checkpoint_id": model.identity,
        "vocab_size": model.limits.vocab_size,
        "max_context": model.limits.max_context,
        "block_size": model.limits.block_size,
        "has_tokenizer": model.tokenizer is not None,
    }


def error_body(error: Exception) -> dict[str, Any]:
    """The body for an error that the status table knows; of others nothing is told."""
    status = status_of(error)
    message = str(error) if isinstance(error, TwoTowerError) else "internal error"
    param = error.field if isinstance(error, InvalidArgument) else None
    return plain_error(message, status.kind, param)


def plain_error(message: str, kind: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """OpenAI's error body."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _if_any(warnings: list[str]) -> dict[str, list[str]]:
    return {"warnings": warnings} if warnings else {}
