"""A word problem, and the builder of one."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from twotower.train.families.math import words

MAX_NUMBER = 100
"""The greatest number in a problem by default."""

MAX_STEPS = 6
"""The most steps of a solution."""

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")

MADE_UP = 0.06
"""Share of names and things that are made-up words."""

SPELLED = 0.04
"""Share of problems that write small numbers as words."""


_VERBS = re.compile(rf"\b({'|'.join(words.PAST)})\b")


@dataclass(frozen=True, slots=True)
class Step:
    """One sum: `left op right = result`."""

    left: int
    op: str
    right: int

    @property
    def result(self) -> int:
        """The sum's value; divisions are exact."""
        if self.op == "/":
            return self.left // self.right
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


PAST = 0.22
"""Share of problems in the past tense."""

ADJECTIVE = 0.08
"""Share of things with an adjective, such as a colour."""


class ImpossibleError(Exception):
    """The numbers left the allowed range, so that another problem must be drawn."""


class Story:
    """Builds a problem, sentence by sentence."""

    def __init__(self, rng: random.Random, max_number: int = MAX_NUMBER) -> None:
        self.rng = rng
        self.max_number = max_number
        self._sentences: list[str] = []
        self._lines: list[str] = []
        self._steps: list[Step] = []
        self._spelled = rng.random() < SPELLED
        self._thing = ""
        self._day: int | None = None
        self._past = rng.random() < PAST
        self._timing = rng.choices(("days", "order", "none", "mixed"), (5, 2, 2, 1))[0]

    @property
    def steps_left(self) -> int:
        """Sums that the solution may still take."""
        return MAX_STEPS - len(self._steps)

    def pick(self, *choices: str) -> str:
        """One of several wordings."""
        return self.rng.choice(choices)

    def chance(self, probability: float) -> bool:
        """True with this probability."""
        return self.rng.random() < probability

    def number(self, low: int, high: int) -> int:
        """A number in [low, high], and at most `max_number`. Raises ImpossibleError if there is none."""
        high = min(high, self.max_number)
        if low > high:
            raise ImpossibleError
        return self.rng.randint(low, high)

    def amount(self, most: int) -> int:
        """The size of a gain or loss, from 1 to `most`, often small. Raises ImpossibleError if there is none."""
        return self.number(1, min(most, self.rng.choice((9, 20, 20, 50, 100))))

    def factors(self) -> tuple[int, int]:
        """Two numbers of at least 2 whose product is allowed."""
        a = self.number(2, self.rng.choice((9, 9, 12, 20)))
        return a, self.number(2, min(self.max_number // a, self.rng.choice((9, 9, 12, 25))))

    def name(self, *others: str) -> str:
        """A person's name, different from the others."""
        while True:
            name = self.rng.choice(words.WOMEN + words.MEN)
            if self.chance(MADE_UP):
                name = words.made_up(self.rng, 2).capitalize()
            if name not in others:
                return name

    def thing(self) -> str:
        """The things that are counted, in the plural."""
        self._thing = words.made_up(self.rng, 2) + "s" if self.chance(MADE_UP) else self.rng.choice(words.THINGS)
        if self.chance(ADJECTIVE):
            self._thing = f"{self.rng.choice(words.ADJECTIVES)} {self._thing}"
        return self._thing

    def she(self, name: str) -> str:
        """She or He."""
        return "She" if words.is_woman(name) else "He"

    def her(self, name: str) -> str:
        """The possessive, her or his."""
        return "her" if words.is_woman(name) else "his"

    def when(self) -> str:
        """The beginning of an event's sentence: a day later than the last one, an ordinal word, or an empty string."""
        timing = self.pick("days", "order", "none") if self._timing == "mixed" else self._timing
        if timing == "none":
            return ""
        if timing == "order":
            return self.pick("Then", "Later", "After that,", "Next,", "Now", "Later,", "In the evening", "The next day", "Then")
        self._day = self.rng.randrange(len(DAYS)) if self._day is None else self._day + self.rng.choice((1, 1, 1, 2))
        return f"On {DAYS[self._day % len(DAYS)]}" + self.pick("", "", ",")

    def shown(self, number: int) -> str:
        """A number in this problem's notation."""
        return words.SPELLED[number] if self._spelled and number < len(words.SPELLED) else str(number)

    def tell(self, sentence: str) -> None:
        """Add a sentence to the question; it is capitalized, and "1 things" becomes singular."""
        sentence = sentence.strip()
        if self._thing:
            one = words.singular(self._thing)
            sentence = re.sub(rf"\b(1|one) (more )?{self._thing}\b", rf"\1 \2{one}", sentence)
        self._sentences.append(self._tensed(sentence[0].upper() + sentence[1:]))

    def _tensed(self, sentence: str) -> str:
        return _VERBS.sub(lambda verb: words.PAST[verb[0]], sentence) if self._past else sentence

    def work(self, line: str, left: int, op: str, right: int) -> int:
        """Add a line to the solution, with the sum in place of `{}`; returns the sum's value. Raises ImpossibleError."""
        step = Step(left, op, right)
        if not 0 <= step.result <= self.max_number or self.steps_left == 0 or max(left, right) > self.max_number:
            raise ImpossibleError
        self._steps.append(step)
        self._lines.append(f"Step {len(self._steps)}: {line.format(step)}.")
        return step.result

    # The kinds of lines. They name no person or thing, so that a solution does not depend on these.

    def gain(self, have: int, n: int) -> int:
        """Add a line for `n` more."""
        return self.work(f"{n} come in, so {{}}", have, "+", n)

    def lose(self, have: int, n: int) -> int:
        """Add a line for `n` fewer."""
        return self.work(f"{n} go away, so {{}}", have, "-", n)

    def groups(self, a: int, b: int) -> int:
        """Add a line for `a` groups of `b`."""
        return self.work(f"{a} groups of {b} are {{}}", a, "*", b)

    def times(self, have: int, n: int) -> int:
        """Add a line for `n` times as many."""
        return self.work(f"{n} times as many are {{}}", have, "*", n)

    def share(self, have: int, n: int) -> int:
        """Add a line for a split into `n` equal parts."""
        return self.work(f"each of {n} equal parts is {{}}", have, "/", n)

    def together(self, a: int, b: int) -> int:
        """Add a line for the sum of both."""
        return self.work("together they are {}", a, "+", b)

    def difference(self, a: int, b: int) -> int:
        """Add a line for how many more `a` is than `b`."""
        return self.work("the difference is {}", a, "-", b)

    def _asked(self, question: str) -> str:
        """The question in the problem's tense, of which only the first verb changes: did she have, or does she have."""
        return _VERBS.sub(lambda verb: words.PAST[verb[0]], question, count=1) if self._past else question

    def ask(self, question: str) -> Problem:
        """Finish the problem, whose answer is the last sum."""
        if not self._steps:
            raise ImpossibleError
        answer = self._steps[-1].result
        lines = (*self._lines, f"The answer is {answer}.")
        return Problem(" ".join([*self._sentences, self._asked(question)]), lines, tuple(self._steps), answer)
