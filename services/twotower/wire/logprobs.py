"""Log probabilities to messages and back. They are fp32 on both sides, so that the wire changes no bit."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from twotower.errors import Incompatible
from twotower.request import TokenLogprob
from twotower.v1 import inference_pb2


def logprobs_to_pb(logprobs: Iterable[TokenLogprob]) -> list[inference_pb2.TokenLogprobs]:
    """Convert log probabilities to messages."""
    return [
        inference_pb2.TokenLogprobs(
            logprob=entry.logprob,
            step=entry.step,
            top=[inference_pb2.TopLogprob(token_id=token, logprob=logprob) for token, logprob in entry.top],
        )
        for entry in logprobs
    ]


def logprobs_from_pb(messages: Iterable[inference_pb2.TokenLogprobs]) -> tuple[TokenLogprob, ...]:
    """Convert messages to log probabilities, unchecked (see `check_logprobs`)."""
    return tuple(
        TokenLogprob(message.logprob, tuple((top.token_id, top.logprob) for top in message.top), message.step or 1)
        for message in messages
    )


def check_logprobs(logprobs: Sequence[TokenLogprob], tokens: int, top: int | None, vocab_size: int) -> None:
    """Raise Incompatible unless these are the logprobs of `tokens` tokens, each with `top` alternatives; with None, of none."""
    wanted = 0 if top is None else tokens
    if len(logprobs) != wanted:
        raise Incompatible(f"done.logprobs: {len(logprobs)}, where {wanted} are due")
    for entry in logprobs:
        if len(entry.top) != top:
            raise Incompatible(f"done.logprobs.top: {len(entry.top)} tokens at a place, where {top} are due")
        if not all(math.isfinite(logprob) for logprob in (entry.logprob, *(logprob for _, logprob in entry.top))):
            raise Incompatible("done.logprobs: one is not finite")
        if any(not 0 <= token < vocab_size for token, _ in entry.top):
            raise Incompatible(f"done.logprobs.top: a token is outside the vocabulary [0, {vocab_size})")
