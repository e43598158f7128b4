"""A choice's tokens on their way to the client: told as soon as it is certain that the text keeps them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from twotower.events import Block, Finished
from twotower.gateway.core import Prepared, ServedModel
from twotower.request import NO_DRAFT, DraftUse, TokenLogprob
from twotower.text.places import TokenPlaces


@dataclass(frozen=True, slots=True)
class ChoiceToken:
    """A token that the text keeps."""

    id: int
    place: int
    """Where it begins, in characters of the choice's text; 0 where nothing asks for it."""
    logprob: TokenLogprob | None
    """None: not asked for, or of a prompt's first token, which nothing comes before."""
    block: int | None
    """Counted from 0; None: it is the prompt's."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A piece of a choice; the pieces together are the choice."""

    index: int
    text: str
    tokens: Sequence[ChoiceToken] = ()
    finish_reason: str | None = None
    """Of the last piece."""
    forwards: int | None = None
    """Of a block,"""
    use: DraftUse = NO_DRAFT
    """and what it took in speculative mode."""


class ChoiceStream:
    """Takes a choice's events, and gives its pieces, in which tokens, their logprobs and the text agree.

    Where the request has stop strings, a token is told with the first of its characters: one behind the cut never is.
    Where it has none and asks for no logprobs, every token is told at once.
    """

    def __init__(self, model: ServedModel, request: Prepared, index: int) -> None:
        self._index = index
        self._may_be_cut = bool(request.stop)
        placed = model.tokenizer is not None and (self._may_be_cut or request.job.params.logprobs is not None)
        self._places = TokenPlaces(model.tokenizer, model.hidden_ids) if placed and model.tokenizer is not None else None
        self._before = 0
        """Characters of the prompt, which is told as part of the text."""
        self._shown = 0
        """Characters that the client has, of what was generated."""
        self._waiting: list[tuple[int, TokenLogprob | None, int]] = []
        """Tokens that are not told, with their logprobs and blocks,"""
        self._placed: list[int] = []
        """and where the first of these begin."""

    def echo(self, text: str, tokens: Sequence[int], logprobs: Sequence[TokenLogprob | None], model: ServedModel) -> Piece:
        """The prompt as the first piece; `logprobs`: one for each token, or none."""
        places = [0] * len(tokens)
        if model.tokenizer is not None and logprobs:
            placing = TokenPlaces(model.tokenizer, model.hidden_ids)
            places = [place for token in tokens for place in placing.push(token)] + placing.finish()
        self._before = len(text)
        told = logprobs or [None] * len(tokens)
        rows = zip(tokens, places, told, strict=True)
        return Piece(self._index, text, [ChoiceToken(token, place, logprob, None) for token, place, logprob in rows])

    def push(self, event: Block | Finished) -> Piece:
        """The piece that an event makes."""
        self._shown += len(event.text)
        if isinstance(event, Finished):
            self._place(self._places.finish() if self._places else [])
            whole = self._places is None or self._shown == self._places.length
            return Piece(self._index, event.text, self._release(whole), event.finish_reason.value)
        logprobs: Sequence[TokenLogprob | None] = event.logprobs or [None] * len(event.token_ids)
        for token, logprob in zip(event.token_ids, logprobs, strict=True):
            self._waiting.append((token, logprob, event.index))
            self._place(self._places.push(token) if self._places else [0])
        return Piece(self._index, event.text, self._release(not self._may_be_cut), forwards=event.forwards, use=event.use)

    def _place(self, places: Sequence[int]) -> None:
        self._placed += places

    def _release(self, kept: bool) -> list[ChoiceToken]:
        """Tokens that can be told; `kept`: all that are placed, as nothing of them can be cut."""
        count = len(self._placed) if kept else sum(place < self._shown for place in self._placed)
        told = [
            ChoiceToken(token, self._before + place, logprob, block)
            for place, (token, logprob, block) in zip(self._placed[:count], self._waiting, strict=False)
        ]
        del self._placed[:count], self._waiting[:count]
        return told
