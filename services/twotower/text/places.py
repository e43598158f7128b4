"""Where in a text each of its tokens begins."""

from __future__ import annotations

from collections.abc import Collection

from twotower.text.stream import REPLACEMENT, Detokenizer
from twotower.text.tokenizer import Tokenizer


class TokenPlaces:
    """Takes a generation's tokens one by one, and says where each begins as soon as that is certain.

    A token that goes on with an unfinished character begins where that character does. Behind bytes that turn out to be no
    character it begins behind their replacements, so that its place is known only once the text there is.
    """

    def __init__(self, tokenizer: Tokenizer, hidden_ids: Collection[int] = ()) -> None:
        """`hidden_ids`: ids that never show, besides the tokenizer's special tokens."""
        self._text = Detokenizer(tokenizer, hidden_ids)
        self.length = 0
        """Characters that are certain."""
        self._waiting: list[int] = []
        """For each token whose place is not certain: the unfinished characters from `length` on to it."""

    def push(self, token_id: int) -> list[int]:
        """Take the next token; returns the places that are certain now, in the tokens' order."""
        before = self._text.unfinished
        if not before:  # nor is any token waiting
            place = self.length
            self.length += len(self._text.push([token_id]))
            return [place]
        new = self._text.push([token_id])
        joined = len(new) + self._text.unfinished == before  # nothing was added: it is a part of the last of them
        self._waiting.append(before - joined)
        return self._settle(new)

    def finish(self) -> list[int]:
        """The places of all that are left; call it once, when no more tokens come."""
        return self._settle(self._text.finish())

    def _settle(self, new: str) -> list[int]:
        replaced = len(new) - len(new.lstrip(REPLACEMENT))
        certain: list[int] = []
        waiting: list[int] = []
        for before in self._waiting:
            if before <= replaced:
                certain.append(self.length + before)
            elif replaced < len(new):  # what was unfinished has become a character, of which this token is a part
                certain.append(self.length + replaced)
            else:
                waiting.append(before - len(new))
        self.length += len(new)
        self._waiting = waiting
        return certain
