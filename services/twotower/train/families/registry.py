"""All families, and which of them one model learns together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from twotower.train.families.code.functions import items as code
from twotower.train.families.item import Item, Split
from twotower.train.families.knowledge.questions import items as knowledge
from twotower.train.families.math import problems as math_problems
from twotower.train.families.math.story import MAX_NUMBER as MATH_MAX_NUMBER
from twotower.train.families.stories import problems as story_problems
from twotower.train.families.stories.story import MAX_NUMBER as STORIES_MAX_NUMBER

DRILLS = "drills"
"""Stands among the shares for texts that are sums alone."""


@dataclass(frozen=True, slots=True)
class TaskSet:
    """What one model learns."""

    families: Mapping[str, Callable[[Split, int, int], Iterator[Item]]]
    """Name -> an endless stream of tasks of a split, from a seed, with numbers up to a greatest one where it has numbers."""
    drills: Callable[[Split, int, int], Iterator[tuple[str, str]]]
    """Prompts and texts of sums, likewise."""
    shares: Mapping[str, float]
    """How often a text is of each family, or of the drills."""
    max_number: int
    """Greatest number, unless asked for otherwise."""

    def with_drills(self, share: float) -> Mapping[str, float]:
        """The shares with another one of drills."""
        rest = 1 - self.shares[DRILLS]
        return {**{name: part * (1 - share) / rest for name, part in self.shares.items()}, DRILLS: share}


TASKS: dict[str, TaskSet] = {
    "stories": TaskSet(
        {"stories": story_problems.items}, story_problems.drills, {"stories": 0.7, DRILLS: 0.3}, STORIES_MAX_NUMBER
    ),
    "suite": TaskSet(
        {
            "math": math_problems.items,
            "code": lambda split, seed, _: code(split, seed),
            "knowledge": lambda split, seed, _: knowledge(split, seed),
        },
        math_problems.drills,
        {"math": 0.42, "code": 0.27, "knowledge": 0.21, DRILLS: 0.10},
        MATH_MAX_NUMBER,
    ),
}
"""Stories: what the shipped checkpoint knows. Suite: math, code and knowledge in one model."""
