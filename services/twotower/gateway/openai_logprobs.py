"""OpenAI's `logprobs` of a choice: tokens, what the model gave them, and where each begins in the text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from twotower.events import Block, Finished
from twotower.gateway.core import Prepared, ServedModel
from twotower.request import TokenLogprob
from twotower.text.stream import Detokenizer


class ChoiceLogprobs:
    """Takes a choice's events, and tells of its tokens as soon as it is certain that the text keeps them.

    Where the request has stop strings, a token is told with the first of its characters: one behind the cut never is.
    Where it asks for no logprobs, nothing is told.
    """

    def __init__(self, model: ServedModel, request: Prepared) -> None:
        self._top = request.job.params.logprobs
        self._may_be_cut = bool(request.stop)
        self._tokenizer = model.tokenizer
        self._text = Detokenizer(model.tokenizer, model.hidden_ids) if model.tokenizer else None
        self._length = 0
        """Characters of all tokens, whether cut or not."""
        self._shown = 0
        """Characters that the client has."""
        self._waiting: list[tuple[int, int, TokenLogprob]] = []
        """Where each token begins, the token, and its logprobs."""
        self._whole = False
        """The text has ended, and nothing was cut."""

    def push(self, event: Block | Finished) -> None:
        """Take the next event."""
        if self._top is None:
            return
        self._shown += len(event.text)
        if isinstance(event, Finished):
            self._length += len(self._text.finish()) if self._text else 0
            self._whole = self._shown == self._length
            return
        for token, told in zip(event.token_ids, event.logprobs, strict=True):
            self._waiting.append((self._length, token, told))
            self._length += len(self._text.push([token])) if self._text else 0

    def release(self) -> dict[str, Any] | None:
        """What is certain now and was not told before, as OpenAI's object; None where it is not asked for."""
        if self._top is None:
            return None
        told = self._waiting
        if self._may_be_cut and not self._whole:
            told = [entry for entry in self._waiting if entry[0] < self._shown]
        self._waiting = self._waiting[len(told) :]
        return {
            "tokens": [self._name(token) for _, token, _ in told],
            "token_logprobs": [logprobs.logprob for *_, logprobs in told],
            "top_logprobs": self._tops(told) if self._top else None,
            "text_offset": [offset for offset, *_ in told],
        }

    def _tops(self, told: Sequence[tuple[int, int, TokenLogprob]]) -> list[dict[str, float]]:
        """The likeliest tokens at each place, the likeliest first, and the token that is there."""
        tops = []
        for _, token, logprobs in told:
            top: dict[str, float] = {}
            for other, logprob in logprobs.top:
                top.setdefault(self._name(other), logprob)  # of two that look the same, the likelier
            tops.append({**top, self._name(token): logprobs.logprob})
        return tops

    def _name(self, token: int) -> str:
        return self._tokenizer.name(token) if self._tokenizer else str(token)
