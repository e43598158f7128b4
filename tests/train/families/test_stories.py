"""The generator: equal for equal seeds, no question in two splits, and right."""

from __future__ import annotations

import itertools
import re
from statistics import mean

import pytest
from tokenizers import Tokenizer

from twotower.train.families.answers import final_number, is_correct, is_degenerate
from twotower.train.families.item import Split
from twotower.train.families.stories.problems import problems, split_of
from twotower.train.families.stories.story import MAX_NUMBER, Problem

SUM = re.compile(r"(\d+) ([-+*]) (\d+) = (\d+) [a-z]+\.$")


def take(split: Split, seed: int, count: int = 2000) -> list[Problem]:
    return list(itertools.islice(problems(split, seed), count))


def test_equal_seeds_give_equal_problems_and_others_do_not() -> None:
    assert take("train", 5, 200) == take("train", 5, 200)
    assert take("train", 5, 200) != take("train", 6, 200)


def test_splits_share_no_question() -> None:
    train = {p.question for p in take("train", 0)} | {p.question for p in take("train", 1)}
    held_out = {p.question for p in take("eval", 0)} | {p.question for p in take("eval", 1)}
    assert not train & held_out
    assert all(split_of(q) == "train" for q in train)
    assert all(split_of(q) == "eval" for q in held_out)


def test_every_line_is_a_right_sum_and_leads_to_the_answer() -> None:
    for problem in take("train", 2):
        *lines, last = problem.lines
        assert 1 <= len(lines) <= 7
        for line in lines:
            found = SUM.search(line)
            assert found is not None, line
            left, op, right, result = int(found[1]), found[2], int(found[3]), int(found[4])
            assert result == {"+": left + right, "-": left - right, "*": left * right}[op]
            assert 0 < result <= MAX_NUMBER
        assert last == f"The answer is {result}."
        assert problem.answer == result


def test_every_number_of_a_sum_is_given_or_was_worked_out() -> None:
    for problem in take("eval", 3):
        known = set(map(int, re.findall(r"\d+", problem.question)))
        for step in problem.steps:
            assert {step.left, step.right} <= known, problem
            known.add(step.result)


@pytest.mark.parametrize("most", [12, 20, 50])
def test_no_number_is_greater_than_asked_for(most: int) -> None:
    texts = [f"{p.question} {p.solution}" for p in itertools.islice(problems("train", 0, most), 500)]
    assert max(int(n) for text in texts for n in re.findall(r"\d+", text)) == most


def test_solution_is_a_function_of_the_question() -> None:
    by_question: dict[str, str] = {}
    for problem in take("train", 4, 20000):
        assert by_question.setdefault(problem.question, problem.solution) == problem.solution


def test_solutions_are_long_enough_to_measure(full_tokenizer: Tokenizer) -> None:
    assert mean(len(full_tokenizer.encode(p.solution).ids) for p in take("eval", 0, 300)) >= 48


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("... so 3 + 4 = 7.\nThe answer is 7.", 7),
        ("The answer is 1.\nThe answer is 42.", 42),
        ("so 3 + 4 = 7.", None),
        ("", None),
    ],
)
def test_final_number(text: str, answer: int | None) -> None:
    assert final_number(text) == answer


def test_degenerate_text_is_wrong_whatever_it_answers() -> None:
    assert is_degenerate("and so and so and so and so and so")
    assert not is_correct("so 2 + 2 = 4, 4, 4, 4, 4, 4. The answer is 4.", 4)
    for problem in take("eval", 1, 500):
        assert is_correct(problem.solution, problem.answer)
        assert not is_correct(problem.solution, problem.answer + 1)
