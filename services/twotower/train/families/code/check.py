"""Hidden assertions: the results that a function must return for arguments that its prompt does not show."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from twotower.train.families.code.sandbox import Call, run_calls

CALLS = 12
"""Assertions of a problem."""

_WORDS = (
    "apple", "Bob", "level", "sea", "TREE", "noon", "banana", "kiwi", "Rust", "a", "stone", "house", "mine", "eve", "PLUM",
    "window", "lamp", "grape", "radar", "hill", "owl", "summer", "ant", "Orange", "fig", "deed", "b", "cherry", "word", "wow",
)  # fmt: skip
_CHARS = "aeioubcdfgklmnprstw AEBTX 0279-"


@dataclass(frozen=True, slots=True)
class Signature:
    """A function's name and parameters, and the kinds of their arguments."""

    name: str
    parameters: tuple[str, ...]
    arguments: tuple[str, ...]
    """The kind of each argument: ints, text, words, n or int."""


@dataclass(frozen=True, slots=True)
class FunctionCheck:
    """The written body must return the same results and types as the reference for all arguments."""

    signature: Signature
    head: str
    reference: str

    def passes(self, text: str) -> bool:
        """See `Check`. Runs the text in the sandbox."""
        body = text if text.startswith(("\n", " ")) else "    " + text
        source = self.head + ("" if body.startswith("\n") else "\n") + body
        return run_calls(source, self.signature.name, self.calls())

    def calls(self) -> list[Call]:
        """The assertions, which are always the same for a problem."""
        rng = random.Random(self.head)
        scope: dict[str, Any] = {}
        exec(f"{self.head}\n{self.reference}", scope)  # the code is our own
        function = scope[self.signature.name]
        calls = []
        for i in range(CALLS):
            arguments = [_argument(rng, kind, i) for kind in self.signature.arguments]
            calls.append(Call(repr(arguments), repr(function(*arguments))))
        return calls


def _argument(rng: random.Random, kind: str, i: int) -> Any:
    """The i-th argument of a kind; the first are edge cases."""
    if kind == "int":
        return rng.choice((0, 1, -1, 2)) if i < 3 else rng.randint(-30, 30)
    if kind == "n":
        return (0, 1, 2)[i] if i < 3 else rng.randint(3, 30)
    if kind == "ints":
        return [] if i == 0 else [rng.randint(-30, 30) for _ in range(rng.randint(1, 3 if i < 4 else 10))]
    if kind == "words":
        return [] if i == 0 else [rng.choice(_WORDS) for _ in range(rng.randint(1, 3 if i < 4 else 8))]
    if i == 0:
        return ""
    if i % 2:
        return " ".join(rng.choice(_WORDS) for _ in range(rng.randint(1, 6)))
    return "".join(rng.choice(_CHARS) for _ in range(rng.randint(1, 20)))
