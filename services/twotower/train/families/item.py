"""What every family makes: a prompt, the text that should follow it, and how a text is scored."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Literal, Protocol

Split = Literal["train", "eval"]
SPLITS: tuple[Split, ...] = ("train", "eval")


class Check(Protocol):
    """Scores a text that followed a prompt."""

    def passes(self, text: str) -> bool:
        """Whether the text is right. Degenerate text is told apart elsewhere (`answers.is_degenerate`)."""


@dataclass(frozen=True, slots=True)
class Item:
    """One task."""

    family: str
    prompt: str
    completion: str
    """What a model should write, without the end-of-sequence token."""
    check: Check


def in_eval(key: str, share: int) -> bool:
    """Whether what `key` names belongs to the evaluation split: one in `share` does, whatever the seed."""
    return zlib.crc32(key.encode()) % share == 0
