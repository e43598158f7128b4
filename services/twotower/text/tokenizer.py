"""The checkpoint's tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import tokenizers

from twotower.errors import CheckpointError, InvalidArgument


class Tokenizer:
    """A `tokenizer.json` of the `tokenizers` library."""

    def __init__(self, inner: tokenizers.Tokenizer) -> None:
        self._inner = inner
        self.special_ids = frozenset(i for i, token in inner.get_added_tokens_decoder().items() if token.special)
        """Ids that never show in text."""
        self._names: dict[int, str] = {}

    @classmethod
    def load(cls, path: Path) -> Tokenizer:
        """Read `tokenizer.json`. Raises CheckpointError."""
        try:
            return cls(tokenizers.Tokenizer.from_file(str(path)))
        except Exception as error:  # the library raises Exception itself
            raise CheckpointError(f"{path} is no tokenizer: {error}") from None

    @property
    def vocab_size(self) -> int:
        """Ids are below this."""
        return self._inner.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, with what the tokenizer itself adds to a text (such as a first token).

        Raises InvalidArgument for a string that is no Unicode text (a lone surrogate).
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidArgument("prompt", f"is not valid Unicode: {error.reason} at position {error.start}") from None
        return list(self._inner.encode(text).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`, without special tokens; bytes that are no UTF-8 become U+FFFD."""
        return self._inner.decode(list(ids), skip_special_tokens=True)

    def name(self, token_id: int) -> str:
        """What a token is called where it stands alone: its text; where it has none, its name in the vocabulary.

        A special token has no text, nor has a part of a character; an id beyond the vocabulary is called by its number.
        """
        if token_id not in self._names:
            alone = self.decode([token_id])
            text = self.decode([token_id, token_id])[len(alone) :]  # decoders may drop a space at a text's beginning
            if not text or "\N{REPLACEMENT CHARACTER}" in text:
                text = self._inner.id_to_token(token_id) or str(token_id)
            self._names[token_id] = text
        return self._names[token_id]
