"""The answer that a text states, and whether the text is degenerate."""

from __future__ import annotations

import re
from dataclasses import dataclass

_ANSWER = re.compile(r"[Tt]he answer is ([^\n]*?)\.?(?:\n|$)")
_NUMBER = re.compile(r"-?\d+")
_CYCLE = re.compile(r"(.{2,60}?)\1{3,}", re.DOTALL)
_BLANK = re.compile(r"[ \n]{4,}")


def final_answer(text: str) -> str | None:
    """The answer in the last "The answer is ...", without the full stop."""
    found = _ANSWER.findall(text)
    return found[-1].strip() if found else None


def final_number(text: str) -> int | None:
    """The number in the last "The answer is ..."."""
    answer = final_answer(text)
    number = _NUMBER.match(answer) if answer is not None else None
    return int(number[0]) if number else None


def is_degenerate(text: str) -> bool:
    """Whether a short piece repeats four times or more in a row, which is wrong even if the answer is right.

    Indentation does not count as repetition.
    """
    return _CYCLE.search(_BLANK.sub("\n", text)) is not None


def is_correct(text: str, answer: int) -> bool:
    """Whether the text ends in the right number and is not degenerate."""
    return final_number(text) == answer and not is_degenerate(text)


@dataclass(frozen=True, slots=True)
class NumberCheck:
    """The last "The answer is N" must state this number."""

    answer: int

    def passes(self, text: str) -> bool:
        """See `Check`."""
        return final_number(text) == self.answer
