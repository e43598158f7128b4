"""The checkpoint's tokenizer."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers.pre_tokenizers import ByteLevel

from twotower.errors import CheckpointError, InvalidArgument

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # texts are encoded one by one: its threads would only be in the way

PIECE = 32 * 1024
"""Characters after which a long text is asked whether it still fits."""

DOUBT = 1.25
"""A text is told to be too long by the sum of its pieces only when that is this much more than what fits: where a text
is cut, its tokens differ a little from those of the whole."""


class Tokenizer:
    """A `tokenizer.json` of the `tokenizers` library."""

    def __init__(self, inner: tokenizers.Tokenizer) -> None:
        self._inner = inner
        self.special_ids = frozenset(i for i, token in inner.get_added_tokens_decoder().items() if token.special)
        """Ids that never show in text."""
        self._names: dict[int, str] = {}
        # A prompt is never cut or filled up unasked, whatever the file says.
        inner.no_truncation()
        inner.no_padding()
        spec = json.loads(inner.to_str())
        self.max_token_bytes = _max_token_bytes(spec)
        """Bytes of text that one token can stand for at most; None: not known of this tokenizer."""
        decoders = {step["type"] for step in _steps(spec["decoder"], "decoders")}
        self._letters = {letter: byte for byte, letter in _byte_alphabet().items()} if "ByteLevel" in decoders else {}
        """How a byte-level tokenizer writes each byte."""
        self._byte_fallback = "ByteFallback" in decoders

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

    def encode(self, text: str, most: int | None = None, *, special_tokens: bool = True) -> list[int]:
        """Token ids of `text`, with what the tokenizer itself adds to a text (such as a first token).

        `special_tokens`: whether it adds that; a chat template has written it already.
        `most`: the tokens that there is room for; a text that cannot fit is refused as soon as that is known, and a
        result may still be longer. Other threads run meanwhile. Raises InvalidArgument for such a text, and for a string
        that is no Unicode text (a lone surrogate).
        """
        if most is not None and self.max_token_bytes is not None and len(text) > most * self.max_token_bytes:
            raise _no_room(text, most)  # a character has a byte or more
        try:
            size = len(text.encode())
        except UnicodeEncodeError as error:
            raise InvalidArgument("prompt", f"is not valid Unicode: {error.reason} at position {error.start}") from None
        if most is not None and size > most:  # else a byte or more each, it fits
            self._check_room(text, size, most)
        return self._ids(text, special_tokens)

    def _check_room(self, text: str, size: int, most: int) -> None:
        if self.max_token_bytes is not None and size > most * self.max_token_bytes:
            raise _no_room(text, most)
        if len(text) <= PIECE:  # it is little work to find out
            return
        tokens = 0
        for start in range(0, len(text), PIECE):
            tokens += len(self._ids(text[start : start + PIECE]))
            if tokens > DOUBT * most:
                raise _no_room(text, most)

    def _ids(self, text: str, special_tokens: bool = True) -> list[int]:
        # Unlike `encode`, it lets other threads run.
        (encoding,) = self._inner.encode_batch_fast([text], add_special_tokens=special_tokens)
        return list(encoding.ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`, without special tokens; bytes that are no UTF-8 become U+FFFD."""
        return self._inner.decode(list(ids), skip_special_tokens=True)

    def name(self, token_id: int) -> str:
        """What a token is called where it stands alone: its text.

        A part of a character is called by its bytes, as OpenAI does it: ``bytes:\\xe6``. What has no text, as a special token,
        has its name in the vocabulary; an id beyond the vocabulary is called by its number.
        """
        if token_id not in self._names:
            alone = self.decode([token_id])
            text = self.decode([token_id, token_id])[len(alone) :]  # decoders may drop a space at a text's beginning
            if not text or "\N{REPLACEMENT CHARACTER}" in text:
                stored, raw = self._inner.id_to_token(token_id), self._raw(token_id)
                text = (stored or str(token_id)) if raw is None else "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
            self._names[token_id] = text
        return self._names[token_id]

    def bytes_of(self, token_id: int) -> bytes:
        """The bytes of text that a token stands for; of one that has no text, those of its name."""
        raw = self._raw(token_id)
        return self.name(token_id).encode(errors="replace") if raw is None else raw

    def _raw(self, token_id: int) -> bytes | None:
        """What a byte-level token, or one that stands for a byte, stands for; None: it is another kind of token."""
        token = None if token_id in self.special_ids else self._inner.id_to_token(token_id)
        if not token:
            return None
        if self._byte_fallback and (byte := _BYTE_TOKEN.fullmatch(token)):
            return bytes.fromhex(byte[1])
        if self._letters and all(letter in self._letters for letter in token):
            return bytes(self._letters[letter] for letter in token)
        return None


_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


def _byte_alphabet() -> dict[int, str]:
    """The letter of each byte in byte-level tokens (GPT-2's): itself where it is printable, else one above U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def _no_room(text: str, most: int) -> InvalidArgument:
    return InvalidArgument("prompt", f"{len(text)} characters of text leave no room in the context of {most} tokens")


def _max_token_bytes(spec: dict[str, Any]) -> int | None:
    """Of a tokenizer that takes every byte into account: the length of its longest token. `spec`: its JSON."""
    model, steps = spec["model"], _steps(spec["pre_tokenizer"], "pretokenizers")
    if model["type"] != "BPE" or spec["normalizer"] is not None:
        return None
    if not any(step["type"] == "ByteLevel" for step in steps):
        return None
    if any(step.get("behavior") == "Removed" for step in steps) or any(
        t["lstrip"] or t["rstrip"] for t in spec["added_tokens"]
    ):
        return None  # text may vanish
    if not set(ByteLevel.alphabet()) <= model["vocab"].keys():
        return None  # bytes may
    added = (len(token["content"].encode()) for token in spec["added_tokens"])
    return max(*map(len, model["vocab"]), *added)  # a character of a byte-level token is a byte


def _steps(part: dict[str, Any] | None, parts: str) -> list[dict[str, Any]]:
    """A pre-tokenizer or decoder as the list of its steps; `parts`: the key of a sequence's."""
    if part is None:
        return []
    if part["type"] == "Sequence":
        return [step for one in part[parts] for step in _steps(one, parts)]
    return [part]
