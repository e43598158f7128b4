"""A word problem, and one in the making."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

MAX_NUMBER = 20
"""No number in a problem exceeds it, unless asked for otherwise: arithmetic is what takes long to learn."""

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


@dataclass(frozen=True, slots=True)
class Step:
    """One sum: `left op right = result`."""

    left: int
    op: str
    right: int

    @property
    def result(self) -> int:
        """The sum's value."""
        return {"+": self.left + self.right, "-": self.left - self.right, "*": self.left * self.right}[self.op]

    def __str__(self) -> str:
        return f"{self.left} {self.op} {self.right} = {self.result}"


@dataclass(frozen=True, slots=True)
class Problem:
    """A question and its worked solution."""

    question: str
    """One paragraph, without a line break."""
    lines: tuple[str, ...]
    """The solution's lines; the last states the answer."""
    steps: tuple[Step, ...]
    answer: int

    @property
    def solution(self) -> str:
        """The lines as one text."""
        return "\n".join(self.lines)


class ImpossibleError(Exception):
    """The numbers left the allowed range: draw again."""


@dataclass(slots=True)
class Story:
    """A problem in the making."""

    rng: random.Random
    max_number: int = MAX_NUMBER
    told: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    _days: int | None = None

    def day(self) -> str:
        """The day of the next event; the first is any, then they follow one another."""
        self._days = self.rng.randrange(len(DAYS)) if self._days is None else self._days + 1
        return DAYS[self._days % len(DAYS)]

    def pick(self, *choices: str) -> str:
        """One of several wordings."""
        return self.rng.choice(choices)

    def number(self, low: int, high: int) -> int:
        """In [low, high], and at most `max_number`. Raises ImpossibleError where that is empty."""
        high = min(high, self.max_number)
        if low > high:
            raise ImpossibleError
        return self.rng.randint(low, high)

    def tell(self, sentence: str) -> None:
        """A sentence of the question."""
        self.told.append(sentence)

    def work(self, text: str, left: int, op: str, right: int, what: str) -> int:
        """A line of the solution: `text`, then the sum and what it counts. Returns its value."""
        step = Step(left, op, right)
        if not 1 <= step.result <= self.max_number:
            raise ImpossibleError
        self.steps.append(step)
        self.lines.append(f"Step {len(self.steps)}: {text}, so {step} {what}.")
        return step.result

    def ask(self, question: str) -> Problem:
        """The finished problem: the last sum is the answer."""
        answer = self.steps[-1].result
        self.lines.append(f"The answer is {answer}.")
        return Problem(" ".join([*self.told, question]), tuple(self.lines), tuple(self.steps), answer)
