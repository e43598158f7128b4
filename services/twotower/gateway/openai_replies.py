"""OpenAI's reply bodies: completions, chats, pieces of their streams, models, errors."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

from twotower.errors import InvalidArgument, TwoTowerError
from twotower.events import Block, Shown
from twotower.gateway.core import ServedModel
from twotower.gateway.openai_choice import ChoiceToken, Piece
from twotower.gateway.openai_fields import MODES, Call
from twotower.gateway.openai_logprobs import chat_logprobs, completion_logprobs, details_of, step_of
from twotower.request import NO_DRAFT
from twotower.status import status_of

MAX_MESSAGE = 2000
"""Characters of an error's message. None is as long, unless it repeats what a client sent."""


class Totals:
    """Usage of one call, over all its prompts."""

    def __init__(self) -> None:
        self._prompt_tokens = 0
        self._completion_tokens = 0
        self._forwards = 0
        self._blocks = 0
        self._rounds = 0
        self._use = NO_DRAFT

    def accept(self, prompt_tokens: int) -> None:
        """A prompt was accepted."""
        self._prompt_tokens += prompt_tokens

    def block(self, block: Block) -> None:
        """A block was written."""
        self._forwards += block.forwards
        self._blocks += 1
        self._rounds += block.use.drafted > 0
        self._use += block.use

    def tell(self, piece: Piece) -> None:
        """A piece goes to the client, with the tokens that the text keeps."""
        self._completion_tokens += sum(token.block is not None for token in piece.tokens)

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
            "blocks": self._blocks,
            "tokens_per_forward": round(self._completion_tokens / self._forwards, 3) if self._forwards else None,
            **(drafts if use != NO_DRAFT else {}),
        }


class Reply(Protocol):
    """The bodies that answer one call."""

    def whole(self, choices: Sequence[Sequence[Piece]], usage: dict[str, Any], warnings: Sequence[str]) -> dict[str, Any]:
        """The reply that is no stream; each choice as its pieces."""
        ...

    def opening(self, index: int) -> dict[str, Any] | None:
        """What a choice's stream begins with, before its first piece; None: nothing."""
        ...

    def chunk(self, piece: Piece) -> dict[str, Any]:
        """A piece of a stream."""
        ...

    def usage_chunk(self, usage: dict[str, Any]) -> dict[str, Any]:
        """The last piece of a stream that was asked for usage."""
        ...

    def step(self, index: int, shown: Shown) -> dict[str, Any]:
        """A choice's block on its way: no choice in it, so that clients who do not know it add nothing to the text."""
        ...


class CompletionReply:
    """`POST /v1/completions`. Implements `Reply`."""

    def __init__(self, call: Call, model: ServedModel, request_id: str, created: int) -> None:
        self._call, self._model = call, model
        self._head = {"id": f"cmpl-{request_id}", "object": "text_completion", "created": created, "model": model.name}

    def whole(self, choices: Sequence[Sequence[Piece]], usage: dict[str, Any], warnings: Sequence[str]) -> dict[str, Any]:
        """See `Reply`."""
        return {**self._head, "choices": [self._choice(pieces) for pieces in choices], "usage": usage, **_if_any(warnings)}

    def opening(self, index: int) -> dict[str, Any] | None:
        """See `Reply`."""
        return None

    def chunk(self, piece: Piece) -> dict[str, Any]:
        """See `Reply`."""
        forwards = _cost(piece)
        return {**self._head, "choices": [{**self._choice([piece]), **forwards}]}

    def usage_chunk(self, usage: dict[str, Any]) -> dict[str, Any]:
        """See `Reply`."""
        return {**self._head, "choices": [], "usage": usage}

    def step(self, index: int, shown: Shown) -> dict[str, Any]:
        """See `Reply`."""
        told = step_of(index, shown, self._model.tokenizer)
        return {**self._head, "object": "text_completion.step", "choices": [], "step": told}

    def _choice(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        tokens, call = _tokens(pieces), self._call
        logprobs = None if call.logprobs is None else completion_logprobs(tokens, call.logprobs, self._model.tokenizer)
        return {
            "index": pieces[0].index,
            "text": "".join(piece.text for piece in pieces),
            "finish_reason": pieces[-1].finish_reason,
            "logprobs": logprobs,
            **_ours(tokens, call),
        }


class ChatReply:
    """`POST /v1/chat/completions`. Implements `Reply`."""

    def __init__(self, call: Call, model: ServedModel, request_id: str, created: int) -> None:
        self._call, self._model = call, model
        self._head = {"id": f"chatcmpl-{request_id}", "object": "chat.completion", "created": created, "model": model.name}
        self._chunk_head = {**self._head, "object": "chat.completion.chunk"}

    def whole(self, choices: Sequence[Sequence[Piece]], usage: dict[str, Any], warnings: Sequence[str]) -> dict[str, Any]:
        """See `Reply`."""
        whole = []
        for pieces in choices:
            text = "".join(piece.text for piece in pieces)
            message = {"role": "assistant", "content": text, "refusal": None}
            whole.append(self._choice(pieces, message=message))
        return {**self._head, "choices": whole, "usage": usage, **_if_any(warnings)}

    def opening(self, index: int) -> dict[str, Any] | None:
        """See `Reply`."""
        delta = {"role": "assistant", "content": ""}
        return {**self._chunk_head, "choices": [self._choice([Piece(index, "")], delta=delta)]}

    def chunk(self, piece: Piece) -> dict[str, Any]:
        """See `Reply`."""
        delta = {"content": piece.text} if piece.text or piece.finish_reason is None else {}
        forwards = _cost(piece)
        return {**self._chunk_head, "choices": [{**self._choice([piece], delta=delta), **forwards}]}

    def usage_chunk(self, usage: dict[str, Any]) -> dict[str, Any]:
        """See `Reply`."""
        return {**self._chunk_head, "choices": [], "usage": usage}

    def step(self, index: int, shown: Shown) -> dict[str, Any]:
        """See `Reply`."""
        told = step_of(index, shown, self._model.tokenizer)
        return {**self._head, "object": "chat.completion.step", "choices": [], "step": told}

    def _choice(self, pieces: Sequence[Piece], **content: Any) -> dict[str, Any]:
        tokens, call = _tokens(pieces), self._call
        return {
            "index": pieces[0].index,
            **content,
            "finish_reason": pieces[-1].finish_reason,
            "logprobs": None if call.logprobs is None else chat_logprobs(tokens, call.logprobs, self._model.tokenizer),
            **_ours(tokens, call),
        }


def model_body(model: ServedModel) -> dict[str, Any]:
    """An element of `/v1/models`; what follows `owned_by` is ours, but for `max_model_len`, which is vLLM's."""
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "twotower",
        "checkpoint_id": model.identity,
        "vocab_size": model.limits.vocab_size,
        "max_context": model.limits.max_context,
        "max_model_len": model.limits.max_context,
        "block_size": model.limits.block_size,
        "modes": list(MODES),
        "has_tokenizer": model.tokenizer is not None,
        "has_chat_template": model.chat is not None,
    }


def error_body(error: Exception) -> dict[str, Any]:
    """The body for an error that the status table knows; of others nothing is told."""
    status = status_of(error)
    message = str(error) if isinstance(error, TwoTowerError) else "internal error"
    param = error.field if isinstance(error, InvalidArgument) else None
    return plain_error(message, status.kind, param)


def plain_error(message: str, kind: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """OpenAI's error body."""
    if len(message) > MAX_MESSAGE:
        message = f"{message[:MAX_MESSAGE]} ..."
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _tokens(pieces: Sequence[Piece]) -> list[ChoiceToken]:
    return [token for piece in pieces for token in piece.tokens]


def _ours(tokens: Sequence[ChoiceToken], call: Call) -> dict[str, Any]:
    """What a choice has besides what OpenAI gives it."""
    return {"token_ids": [token.id for token in tokens], **({"details": details_of(tokens)} if call.details else {})}


def _cost(piece: Piece) -> dict[str, Any]:
    """What a block took."""
    forwards = {} if piece.forwards is None else {"forwards": piece.forwards}
    return forwards | ({"draft": dataclasses.asdict(piece.use)} if piece.use != NO_DRAFT else {})


def _if_any(warnings: Sequence[str]) -> dict[str, list[str]]:
    return {"warnings": list(warnings)} if warnings else {}
