"""A word problem, and the builder of one."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

MAX_NUMBER = 20
"""The greatest number in a problem by default: arithmetic takes the longest to learn."""

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
    """The numbers left the allowed range, so that another problem must be drawn."""


@dataclass(slots=True)
class Story:
    """Builds a problem, sentence by sentence."""

    rng: random.Random
    max_number: int = MAX_NUMBER
    sentences: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    _days: int | None = None

    def day(self) -> str:
        """The day of the next event; the first is random, and the next ones follow one another."""
        self._days = self.rng.randrange(len(DAYS)) if self._days is None else self._days + 1
        return DAYS[self._days % len(DAYS)]

    def pick(self, *choices: str) -> str:
        """One of several wordings."""
        return self.rng.choice(choices)

    def number(self, low: int, high: int) -> int:
        """A number in [low, high], and at most `max_number`. Raises ImpossibleError if there is none."""
        high = min(high, self.max_number)
        if low > high:
            raise ImpossibleError
        return self.rng.randint(low, high)

    def tell(self, sentence: str) -> None:
        """Add a sentence to the question."""
        self.sentences.append(sentence)

    def work(self, text: str, left: int, op: str, right: int, what: str) -> int:
        """Add a line to the solution: `text`, then the sum and what it counts. Returns the sum's value."""
        step = Step(left, op, right)
        if not 1 <= step.result <= self.max_number:
            raise ImpossibleError
        self.steps.append(step)
        self.lines.append(f"Step {len(self.steps)}: {text}, so {step} {what}.")
        return step.result

    def ask(self, question: str) -> Problem:
        """Finish the problem, whose answer is the last sum."""
        answer = self.steps[-1].result
        self.lines.append(f"The answer is {answer}.")
        return Problem(" ".join([*self.sentences, question]), tuple(self.lines), tuple(self.steps), answer)
