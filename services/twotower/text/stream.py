"""Tokens to text while they arrive: no half characters, and nothing beyond a stop string."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from twotower.text.tokenizer import Tokenizer

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"

MAX_UNFINISHED = 3
"""A UTF-8 character has at most 4 bytes, so what may still become one shows as at most 3 replacement characters
(one for each byte, with decoders that count so; else one)."""

WINDOW = 48
CONTEXT = 8
"""Once more than WINDOW tokens are held, the last CONTEXT or so are kept: decoders look at a token's neighbours."""


class Detokenizer:
    """Text of a growing sequence of tokens; an unfinished character at the end is held back.

    Each push decodes a bounded window, whatever the length of the text.
    """

    def __init__(self, tokenizer: Tokenizer, hidden_ids: Collection[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._hidden = frozenset(hidden_ids) | tokenizer.special_ids
        self._window: list[int] = []
        self._told = 0  # characters of the window's text that were returned
        self._held = 0

    @property
    def unfinished(self) -> int:
        """Characters that the tokens so far would add if they were the last: replacements for what is held back."""
        return self._held

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that these tokens make certain."""
        self._window += [i for i in token_ids if i not in self._hidden]
        text = self._tokenizer.decode(self._window)
        certain = len(text)
        while certain > self._told and len(text) - certain < MAX_UNFINISHED and text[certain - 1] == REPLACEMENT:
            certain -= 1
        new = text[self._told : certain]
        self._told = max(self._told, certain)
        self._held = len(text) - certain
        if certain == len(text) and len(self._window) > WINDOW:
            self._shorten(text)
        return new

    def finish(self) -> str:
        """The rest, with replacement characters for what stayed unfinished."""
        text = self._tokenizer.decode(self._window)
        new = text[self._told :]
        self._told, self._held = len(text), 0
        return new

    def _shorten(self, text: str) -> None:
        """Forget the window's first tokens, at a place that is no middle of a character."""
        for keep in range(CONTEXT, 2 * CONTEXT):
            tail = self._tokenizer.decode(self._window[-keep:])
            if text.endswith(tail) and not tail.startswith(REPLACEMENT):
                self._window = self._window[-keep:]
                self._told = len(tail)
                return


class TextStream:
    """Text of a generation, cut before the first stop string.

    What may begin a stop string is held back until it is known. The result does not depend on how the
    tokens are divided into pushes: the stop string that is complete first counts.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), hidden_ids: Collection[int] = ()) -> None:
        """`hidden_ids`: ids that never show, besides the tokenizer's special tokens."""
        self._detokenizer = Detokenizer(tokenizer, hidden_ids)
        self._stop = tuple(stop)
        self._held = ""
        self.stopped = False
        """Whether a stop string was found; nothing more comes then."""

    def push(self, token_ids: Sequence[int]) -> str:
        """The text these tokens add, as far as it is certain."""
        return "" if self.stopped else self._cut(self._detokenizer.push(token_ids))

    def finish(self) -> str:
        """The text that was held back; call it once, when no more tokens come."""
        if self.stopped:
            return ""
        text = self._cut(self._detokenizer.finish())
        rest, self._held = self._held, ""
        return text + rest

    def _cut(self, new: str) -> str:
        text = self._held + new
        found = [(start + len(stop), start) for stop in self._stop if (start := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            self._held = ""
            return text[: min(found)[1]]
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`, without being all of it."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
