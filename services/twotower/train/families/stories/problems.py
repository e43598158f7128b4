"""English word problems with worked solutions, generated from a seed.

A solution is a function of its question: all variety is in the question (names, things, order, wording), so
that a model can be sure of what it writes. Each step names what happens and shows one small sum, as in
``Step 2: on Friday Tom buys 7 more apples, so 12 + 7 = 19 apples.``, and the last line is ``The answer is 19.``

Training and evaluation never share a question: a hash of the question decides which split it belongs to,
whatever the seed.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

from twotower.train.families.answers import NumberCheck
from twotower.train.families.item import SPLITS, Item, Split, in_eval
from twotower.train.families.stories.kinds import KINDS
from twotower.train.families.stories.story import MAX_NUMBER, ImpossibleError, Problem, Story

EVAL_SHARE = 16
"""One question in `EVAL_SHARE` belongs to the evaluation split."""


DRILL_SUMS = 10


def split_of(question: str) -> Split:
    """The split of a question: train or eval."""
    return "eval" if in_eval(question, EVAL_SHARE) else "train"


def problems(split: Split, seed: int, max_number: int = MAX_NUMBER) -> Iterator[Problem]:
    """An endless stream of problems; equal for equal arguments. No question occurs in two splits."""
    assert split in SPLITS, split
    rng = random.Random(f"{split}:{seed}")
    while True:
        problem = _draw(rng, max_number)
        if problem is not None and split_of(problem.question) == split:
            yield problem


def _draw(rng: random.Random, max_number: int) -> Problem | None:
    story = Story(rng, max_number)
    try:
        return rng.choice(KINDS)(story)
    except ImpossibleError:
        return None


def items(split: Split, seed: int, max_number: int = MAX_NUMBER) -> Iterator[Item]:
    """The problems as tasks."""
    for problem in problems(split, seed, max_number):
        yield Item("stories", problem.question, problem.solution, NumberCheck(problem.answer))


def drills(split: Split, seed: int, max_number: int = MAX_NUMBER) -> Iterator[tuple[str, str]]:
    """Prompts and texts of single sums, as in problems: a problem has only a few sums, and sums are hard to learn."""
    sums = (step for problem in problems(split, seed, max_number) for step in problem.steps)
    while True:
        some = list(itertools.islice(sums, DRILL_SUMS))
        asked = ", ".join(f"{s.left} {s.op} {s.right}" for s in some)
        yield f"Work out {asked}.", "\n".join(f"Step {i}: so {s}." for i, s in enumerate(some, 1))
