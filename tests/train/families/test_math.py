"""Word problems of one to six steps: equal for equal seeds, no question in two splits, and right."""

from __future__ import annotations

import itertools
import re

import pytest

from tests.eval.hand_written import PROBLEMS
from twotower.train.families.item import Split
from twotower.train.families.math.problems import drills, items, problems, split_of
from twotower.train.families.math.story import MAX_NUMBER, Problem

SUM = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)\.$")
RULES = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__, "/": int.__floordiv__}
SPELLED = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]


def take(split: Split, seed: int, count: int = 500) -> list[Problem]:
    return list(itertools.islice(problems(split, seed), count))


def test_equal_seeds_give_equal_problems_and_others_do_not() -> None:
    assert take("train", 5, 100) == take("train", 5, 100) != take("train", 6, 100)


def test_splits_share_no_question() -> None:
    train = {p.question for p in take("train", 0)}
    held_out = {p.question for p in take("eval", 0, 100)}
    assert not train & held_out
    assert all(split_of(q) == "train" for q in train)
    assert all(split_of(q) == "eval" for q in held_out)


def test_every_number_of_steps_comes() -> None:
    assert {len(p.steps) for p in take("train", 1)} >= {1, 2, 3, 4, 5, 6}


def test_every_line_is_a_right_sum_and_leads_to_the_answer() -> None:
    for problem in take("train", 2):
        *lines, last = problem.lines
        assert len(lines) == len(problem.steps)
        for line, step in zip(lines, problem.steps, strict=True):
            found = SUM.search(line)
            assert found is not None, line
            left, op, right, result = int(found[1]), found[2], int(found[3]), int(found[4])
            assert (left, op, right, result) == (step.left, step.op, step.right, step.result)
            assert result == RULES[op](left, right)
            assert op != "/" or left == result * right
            assert 0 <= result <= MAX_NUMBER
        assert last == f"The answer is {result}."
        assert problem.answer == result


def test_every_number_of_a_sum_is_given_or_was_worked_out() -> None:
    for problem in take("train", 3):
        question = problem.question.lower()
        known = set(map(int, re.findall(r"\d+", question)))
        known |= {i for i, word in enumerate(SPELLED) if re.search(rf"\b{word}\b", question)}
        known |= {2} if re.search(r"half|halves|twice|doubl|pair", question) else set()
        known |= {3} if "tripl" in question else set()
        known |= {12} if "dozen" in question else set()
        for step in problem.steps:
            assert {step.left, step.right} <= known, problem
            known.add(step.result)


@pytest.mark.parametrize("most", [20, 50])
def test_no_number_is_greater_than_asked_for(most: int) -> None:
    texts = [f"{p.question} {p.solution}" for p in itertools.islice(problems("train", 0, most), 200)]
    assert max(int(n) for text in texts for n in re.findall(r"\d+", text)) <= most


def test_solution_is_a_function_of_the_question() -> None:
    by_question: dict[str, str] = {}
    for problem in take("train", 4, 2000):
        assert by_question.setdefault(problem.question, problem.solution) == problem.solution


def test_a_task_is_passed_by_its_own_text_and_by_no_other_number() -> None:
    for item, other in itertools.pairwise(itertools.islice(items("train", 7), 50)):
        assert item.check.passes(item.completion)
        assert item.check.passes(other.completion) == (item.completion.split()[-1] == other.completion.split()[-1])


def test_drills_are_right_sums() -> None:
    for prompt, text in itertools.islice(drills("train", 0, 30), 20):
        assert prompt.startswith("Work out ")
        for line in text.splitlines():
            found = SUM.search(line)
            assert found is not None, line
            assert RULES[found[2]](int(found[1]), int(found[3])) == int(found[4]) <= 30


def test_problems_written_by_hand_are_made_of_words_that_training_sees() -> None:
    words = re.compile(r"[A-Za-z]+")
    known = {word for p in take("train", 8, 4000) for word in words.findall(p.question)}
    unknown = {word for question, _ in PROBLEMS for word in words.findall(question) if word not in known}
    assert not unknown
