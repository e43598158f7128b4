"""Log probabilities and details of tokens, in the forms that OpenAI's endpoints give them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from twotower.events import Shown
from twotower.gateway.openai_choice import ChoiceToken
from twotower.text.tokenizer import Tokenizer


def completion_logprobs(tokens: Sequence[ChoiceToken], top: int, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """`logprobs` of a completion's choice: tokens, what the model gave them, and where each begins in the text."""
    return {
        "tokens": [name_of(token.id, tokenizer) for token in tokens],
        "token_logprobs": [None if token.logprob is None else token.logprob.logprob for token in tokens],
        "top_logprobs": [_top(token, tokenizer) for token in tokens] if top else None,
        "text_offset": [token.place for token in tokens],
    }


def chat_logprobs(tokens: Sequence[ChoiceToken], top: int, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """`logprobs` of a chat's choice."""
    content = [
        {
            **_entry(token.id, token.logprob.logprob, tokenizer),
            "top_logprobs": [_entry(other, logprob, tokenizer) for other, logprob in token.logprob.top[:top]],
        }
        for token in tokens
        if token.logprob is not None
    ]
    return {"content": content, "refusal": None}


def details_of(tokens: Sequence[ChoiceToken]) -> list[dict[str, Any]]:
    """Ours: of each token the block, the forward of it that committed the token, and how sure the model was."""
    return [
        {
            "token_id": token.id,
            "block": token.block,
            "step": token.logprob.step if token.logprob else None,
            "confidence": math.exp(token.logprob.logprob) if token.logprob else None,
        }
        for token in tokens
        if token.block is not None
    ]


def step_of(index: int, shown: Shown, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Ours: a choice's block on its way."""
    step = shown.step
    return {
        "index": index,
        "block": shown.block,
        "number": step.number,
        "token_ids": list(step.token_ids),
        "tokens": [name_of(token, tokenizer) for token in step.token_ids],
        "committed": list(step.committed),
        "confidence": list(step.confidence),
    }


def name_of(token: int, tokenizer: Tokenizer | None) -> str:
    """What a token is called; without a tokenizer, its number."""
    return tokenizer.name(token) if tokenizer else str(token)


def _top(token: ChoiceToken, tokenizer: Tokenizer | None) -> dict[str, float] | None:
    """The likeliest tokens at a place, the likeliest first, and the token that is there."""
    if token.logprob is None:
        return None
    top: dict[str, float] = {}
    for other, logprob in token.logprob.top:
        top.setdefault(name_of(other, tokenizer), logprob)  # of two that look the same, the likelier
    return {**top, name_of(token.id, tokenizer): token.logprob.logprob}


def _entry(token: int, logprob: float, tokenizer: Tokenizer | None) -> dict[str, Any]:
    raw = list(tokenizer.bytes_of(token)) if tokenizer else None
    return {"token": name_of(token, tokenizer), "logprob": logprob, "bytes": raw}
