"""Log probabilities as messages, and back. fp32 on both sides, so that the wire changes no bit of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from twotower.errors import Incompatible
from twotower.request import TokenLogprob
from twotower.v1 import inference_pb2


def logprobs_to_pb(logprobs: Iterable[TokenLogprob]) -> list[inference_pb2.TokenLogprobs]:
    """For the wire."""
    return [
        inference_pb2.TokenLogprobs(
            logprob=told.logprob,
            step=told.step,
            top=[inference_pb2.TopLogprob(token_id=token, logprob=logprob) for token, logprob in told.top],
        )
        for told in logprobs
    ]


def logprobs_from_pb(messages: Iterable[inference_pb2.TokenLogprobs]) -> tuple[TokenLogprob, ...]:
    """From the wire; unchecked (see `check_logprobs`)."""
    return tuple(
        TokenLogprob(message.logprob, tuple((top.token_id, top.logprob) for top in message.top), message.step or 1)
        for message in messages
    )


def check_logprobs(logprobs: Sequence[TokenLogprob], tokens: int, top: int | None, vocab_size: int) -> None:
    """Raise Incompatible unless these are the logprobs of so many tokens, each with `top` others; none, if that is None."""
    wanted = 0 if top is None else tokens
    if len(logprobs) != wanted:
        raise Incompatible(f"done.logprobs: {len(logprobs)}, where {wanted} are due")
    for told in logprobs:
        if len(told.top) != top:
            raise Incompatible(f"done.logprobs.top: {len(told.top)} tokens at a place, where {top} are due")
        if not all(math.isfinite(logprob) for logprob in (told.logprob, *(logprob for _, logprob in told.top))):
            raise Incompatible("done.logprobs: one is not finite")
        if any(not 0 <= token < vocab_size for token, _ in told.top):
            raise Incompatible(f"done.logprobs.top: a token is outside the vocabulary [0, {vocab_size})")
