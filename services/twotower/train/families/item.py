"""The items that every family makes: a prompt, its completion, and a check that scores texts."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Literal, Protocol

Split = Literal["train", "eval"]
SPLITS: tuple[Split, ...] = ("train", "eval")


class Check(Protocol):
    """Scores a text that followed a prompt."""

    def passes(self, text: str) -> bool:
        """Whether the text is right. `answers.is_degenerate` finds degenerate text separately."""


@dataclass(frozen=True, slots=True)
class Item:
    """One task."""

    family: str
    prompt: str
    completion: str
    """The text that a model should write, without the end-of-sequence token."""
    check: Check


def in_eval(key: str, share: int) -> bool:
    """Whether the item of `key` belongs to the evaluation split: one in `share` does, whatever the seed."""
    return zlib.crc32(key.encode()) % share == 0
