"""All families, and the task sets, the families that one model learns."""

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
"""The key, among the shares, of texts of single sums."""


@dataclass(frozen=True, slots=True)
class TaskSet:
    """The tasks that one model learns."""

    families: Mapping[str, Callable[[Split, int, int], Iterator[Item]]]
    """Name -> a function of split, seed and greatest number (if the family has numbers) to an endless stream of tasks."""
    drills: Callable[[Split, int, int], Iterator[tuple[str, str]]]
    """A function of the same arguments to prompts and texts of sums."""
    shares: Mapping[str, float]
    """The share of each family, and of the drills."""
    max_number: int
    """The greatest number by default."""

    def with_drills(self, share: float) -> Mapping[str, float]:
        """The shares with `share` for the drills."""
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
"""`stories` is what the shipped checkpoint learned; `suite` is math, code and knowledge in one model."""
