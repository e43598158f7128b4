"""English word problems with worked solutions, generated from a seed.

A solution is a function of its question: all variety is in the question (names, things, order, wording), so
that a model can be sure of what it writes. Each step names what happens and shows one small sum, as in
``Step 2: 7 come in, so 12 + 7 = 19.``, and the last line is ``The answer is 19.``

Training and evaluation never share a question: a hash of the question decides which split it belongs to,
whatever the seed.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from twotower.train.families.answers import NumberCheck
from twotower.train.families.item import SPLITS, Item, Split, in_eval
from twotower.train.families.math.stories import KINDS, operands
from twotower.train.families.math.story import MAX_NUMBER, ImpossibleError, Problem, Step, Story

EVAL_SHARE = 16
"""One question in `EVAL_SHARE` belongs to the evaluation split."""

STEP_SHARES = (5, 5, 4, 3, 3, 3)
"""How often problems of 1, 2 ... 6 steps occur, relative to one another."""

DRILL_SUMS = 10


def split_of(question: str) -> Split:
    """The split of a question: train or eval."""
    return "eval" if in_eval(question, EVAL_SHARE) else "train"


def problems(split: Split, seed: int, max_number: int = MAX_NUMBER) -> Iterator[Problem]:
    """An endless stream of problems; equal for equal arguments. No question occurs in two splits."""
    assert split in SPLITS, split
    rng = random.Random(f"{split}:{seed}")
    while True:
        wanted = rng.choices(range(1, len(STEP_SHARES) + 1), STEP_SHARES)[0]
        yield _draw(rng, split, wanted, max_number)


def _draw(rng: random.Random, split: Split, steps: int, max_number: int) -> Problem:
    """A problem with `steps` steps, of a kind that has such problems; if none is found soon, with any number of steps."""
    makers, shares = zip(*KINDS, strict=True)
    tries = 0
    while True:
        try:
            problem = rng.choices(makers, shares)[0](Story(rng, max_number))
        except ImpossibleError:
            continue
        if split_of(problem.question) != split:
            continue
        tries += 1
        if len(problem.steps) == steps or tries > 60:
            return problem


def items(split: Split, seed: int, max_number: int = MAX_NUMBER) -> Iterator[Item]:
    """The problems as tasks."""
    for problem in problems(split, seed, max_number):
        yield Item("math", problem.question, problem.solution, NumberCheck(problem.answer))


def drills(split: Split, seed: int, max_number: int = MAX_NUMBER) -> Iterator[tuple[str, str]]:
    """Prompts and texts of single sums: a problem has only a few sums, and arithmetic is the hardest part to learn."""
    rng = random.Random(f"drills:{split}:{seed}")
    story = Story(rng, max_number)
    while True:
        ops = rng.choices("+-*/", (40, 36, 14, 10), k=DRILL_SUMS)
        sums = [Step(left, op, right) for op in ops for left, right in (operands(story, op),)]
        asked = ", ".join(f"{s.left} {s.op} {s.right}" for s in sums)
        yield f"Work out {asked}.", "\n".join(f"Step {i}: so {s}." for i, s in enumerate(sums, 1))
