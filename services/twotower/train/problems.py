"""English word problems with worked solutions, generated from a seed.

A solution is a function of its question: all variety is in the question (names, things, order, wording), so
that a model can be sure of what it writes. Each step names what happens and shows one small sum, as in
``Step 2: on Friday Tom buys 7 more apples, so 12 + 7 = 19 apples.``, and the last line is ``The answer is 19.``

Training and evaluation never share a question: a hash of the question decides which split it belongs to,
whatever the seed.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator

from twotower.train.stories import KINDS
from twotower.train.story import MAX_NUMBER, ImpossibleError, Problem, Story

SPLITS = ("train", "eval")
EVAL_SHARE = 16
"""One question in so many belongs to the evaluation split."""


def split_of(question: str) -> str:
    """Which split a question belongs to: train or eval."""
    return SPLITS[zlib.crc32(question.encode()) % EVAL_SHARE == 0]


def problems(split: str, seed: int, max_number: int = MAX_NUMBER) -> Iterator[Problem]:
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
