"""Scoring of a generated solution."""

from __future__ import annotations

import re

_ANSWER = re.compile(r"[Tt]he answer is (-?\d+)\b")
_CYCLE = re.compile(r"(.{2,60}?)\1{3,}", re.DOTALL)


def final_answer(text: str) -> int | None:
    """The number that the last "The answer is ..." states."""
    found = _ANSWER.findall(text)
    return int(found[-1]) if found else None


def is_degenerate(text: str) -> bool:
    """A short piece repeated four times or more in a row: wrong, even where the answer is right."""
    return _CYCLE.search(text) is not None


def is_correct(text: str, answer: int) -> bool:
    """The right final answer, and no degenerate text."""
    return final_answer(text) == answer and not is_degenerate(text)
