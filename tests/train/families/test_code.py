"""Functions from docstrings: the reference passes its hidden assertions, what is wrong or harmful does not."""

from __future__ import annotations

import itertools

import pytest

from twotower.train.families.code.functions import items
from twotower.train.families.code.sandbox import Call, run_calls

ONE = [Call("[3]", "6")]


def test_equal_seeds_give_equal_tasks_and_others_do_not() -> None:
    one, again, other = ([i.prompt for i in itertools.islice(items("train", seed), 50)] for seed in (1, 1, 2))
    assert one == again != other


def test_splits_share_no_prompt_and_no_composition() -> None:
    train = {i.prompt for i in itertools.islice(items("train", 0), 2000)}
    held_out = {i.prompt for i in itertools.islice(items("eval", 0), 500)}
    assert not train & held_out


def test_what_completes_a_prompt_is_python() -> None:
    for split in ("train", "eval"):
        for item in itertools.islice(items(split, 3), 200):
            compile(f"{item.prompt}\n{item.completion}", "task", "exec")


def test_references_pass_and_another_task_s_text_does_not() -> None:
    tasks = list(itertools.islice(items("eval", 5), 6))
    for item in tasks:
        assert item.check.passes(item.completion), item
        assert not item.check.passes("    return object")
        assert not item.check.passes("")


@pytest.mark.parametrize(
    "body",
    [
        "return n * 3",
        "return 6.0",  # another type
        "return",
        "retrun n * 2",
        "raise ValueError",
        "while True: pass",
        "return [0] * 10**12",
        "import os\n    return n * 2",
        "return open('/etc/passwd') and n * 2",
        "return n * 2 if ().__class__ else 0",
        "return '{0.__class__}'.format(n) and n * 2",
        "print('\\npassed')\n    return 1",
        "raise SystemExit(0)",
    ],
)
def test_wrong_and_harmful_bodies_fail(body: str) -> None:
    assert not run_calls(f"def f(n):\n    {body}\n", "f", ONE)


def test_right_bodies_pass() -> None:
    assert run_calls("def f(n):\n    return n * 2\n", "f", ONE)
    assert run_calls("def f(n):\n    total = 0\n    for x in [n, n]:\n        total += x\n    return total\n", "f", ONE)
