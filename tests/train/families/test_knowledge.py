"""A closed world: questions in other words in each split, answers that follow from its facts."""

from __future__ import annotations

import itertools
import re

from twotower.train.families.item import Item, Split
from twotower.train.families.knowledge.questions import items


def take(split: Split, seed: int, count: int = 600) -> list[Item]:
    return list(itertools.islice(items(split, seed), count))


def test_equal_seeds_give_equal_questions_and_others_do_not() -> None:
    assert take("train", 1, 50) == take("train", 1, 50) != take("train", 2, 50)


def test_splits_share_no_question() -> None:
    assert not {i.prompt for i in take("train", 0, 3000)} & {i.prompt for i in take("eval", 0)}


def test_answers_pass_and_others_do_not() -> None:
    for item in take("eval", 3):
        assert item.check.passes(item.completion), item
        assert not item.check.passes("The answer is nothing of this.")
        assert not item.check.passes("")


def test_a_choice_has_different_answers_and_its_letter_is_the_right_one() -> None:
    choices = [item for item in take("train", 4) if "\nA" in item.prompt]
    assert len(choices) > 100
    for item in choices:
        offered = dict(re.findall(r"^([A-D])[.):] (.*)$", item.prompt, re.MULTILINE))
        assert len(set(offered.values())) == len(offered) >= 3, item  # months have three numbers of days
        right = [letter for letter, said in offered.items() if item.check.passes(f"The answer is {letter}.")]
        assert len(right) == 1, item
        assert f"{offered[right[0]]}" in item.completion.removesuffix(f"The answer is {right[0]}."), item


def test_a_question_has_one_answer() -> None:
    answers: dict[str, str] = {}
    for item in take("train", 5, 5000):
        last = item.completion.splitlines()[-1]
        assert answers.setdefault(item.prompt, last) == last
