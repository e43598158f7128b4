"""Functions that decide between two expressions."""

from __future__ import annotations

import random
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Branch:
    """A function that decides between two expressions."""

    key: str
    """A key that is equal for equal compositions."""
    parameters: tuple[str, ...]
    docstring: str
    body: tuple[str, ...]
    arguments: tuple[str, ...]
    words: list[str]


Said = tuple[str, str, tuple[str, ...]]
"""A name, the code, and the docstring's wordings for it."""

_PAIRS: tuple[tuple[str, ...], ...] = (("a", "b"), ("x", "y"), ("first", "second"), ("left", "right"), ("m", "n"), ("p", "q"))
_SINGLES = ("n", "x", "number", "value", "a", "num", "k")

_CONDITIONS2: tuple[Said, ...] = (
    ("greater", "{a} > {b}", ("{a} is greater than {b}", "{a} is larger than {b}")),
    ("less", "{a} < {b}", ("{a} is less than {b}", "{a} is smaller than {b}")),
    ("equal", "{a} == {b}", ("{a} equals {b}", "{a} and {b} are equal")),
    ("different", "{a} != {b}", ("{a} is not equal to {b}", "{a} and {b} differ")),
    ("even_a", "{a} % 2 == 0", ("{a} is even",)),
    ("odd_a", "{a} % 2 == 1", ("{a} is odd",)),
    ("even_b", "{b} % 2 == 0", ("{b} is even",)),
    ("positive_a", "{a} > 0", ("{a} is positive",)),
    ("negative_b", "{b} < 0", ("{b} is negative",)),
    ("big", "{a} + {b} > {k}", ("the sum of {a} and {b} is greater than {k}", "{a} plus {b} is greater than {k}")),
)
_EXPRESSIONS2: tuple[Said, ...] = (
    ("sum", "{a} + {b}", ("the sum of {a} and {b}", "{a} plus {b}")),
    ("difference", "{a} - {b}", ("{a} minus {b}",)),
    ("other_difference", "{b} - {a}", ("{b} minus {a}",)),
    ("product", "{a} * {b}", ("the product of {a} and {b}", "{a} times {b}")),
    ("a", "{a}", ("{a}",)),
    ("b", "{b}", ("{b}",)),
    ("double_a", "{a} * 2", ("twice {a}", "{a} doubled")),
    ("double_b", "{b} * 2", ("twice {b}", "{b} doubled")),
    ("square_a", "{a} * {a}", ("the square of {a}", "{a} squared")),
    ("square_b", "{b} * {b}", ("the square of {b}", "{b} squared")),
    ("constant", "{k}", ("{k}",)),
    ("a_plus", "{a} + {k}", ("{a} plus {k}",)),
    ("b_plus", "{b} + {k}", ("{b} plus {k}",)),
)
_CONDITIONS1: tuple[Said, ...] = (
    ("even", "{a} % 2 == 0", ("{a} is even",)),
    ("odd", "{a} % 2 == 1", ("{a} is odd",)),
    ("positive", "{a} > 0", ("{a} is positive",)),
    ("negative", "{a} < 0", ("{a} is negative",)),
    ("zero", "{a} == 0", ("{a} is zero",)),
    ("greater", "{a} > {k}", ("{a} is greater than {k}", "{a} is above {k}")),
    ("less", "{a} < {k}", ("{a} is less than {k}", "{a} is below {k}")),
    ("at_least", "{a} >= {k}", ("{a} is at least {k}",)),
    ("divisible", "{a} % {k} == 0", ("{a} is divisible by {k}", "{a} is a multiple of {k}")),
)
_EXPRESSIONS1: tuple[Said, ...] = (
    ("same", "{a}", ("{a}", "{a} itself")),
    ("double", "{a} * 2", ("twice {a}", "{a} doubled")),
    ("square", "{a} * {a}", ("the square of {a}", "{a} squared")),
    ("negative", "-{a}", ("the negative of {a}", "{a} negated")),
    ("half", "{a} // 2", ("half of {a}, rounded down",)),
    ("plus", "{a} + {k}", ("{a} plus {k}", "the sum of {a} and {k}")),
    ("minus", "{a} - {k}", ("{a} minus {k}",)),
    ("times", "{a} * {k}", ("{a} times {k}", "the product of {a} and {k}")),
    ("constant", "{k}", ("{k}",)),
    ("true", "True", ("True",)),
    ("false", "False", ("False",)),
)


def draw_branch(rng: random.Random) -> Branch:
    """A random function of one or two numbers that decides between two expressions."""
    if rng.random() < 0.6:
        names: tuple[str, ...] = rng.choice(_PAIRS)
        conditions, expressions = _CONDITIONS2, _EXPRESSIONS2
    else:
        names = (rng.choice(_SINGLES),)
        conditions, expressions = _CONDITIONS1, _EXPRESSIONS1
    condition = rng.choice(conditions)
    then, other = rng.sample(expressions, 2)

    def fill(code: str, said: tuple[str, ...]) -> tuple[str, str]:
        values = {"a": names[0], "b": names[-1], "k": str(rng.randint(2, 20))}
        return code.format(**values), rng.choice(said).format(**values)

    (test, if_said), (yes, yes_said), (no, no_said) = (fill(code, said) for _, code, said in (condition, then, other))
    docstring = rng.choice(
        (
            f"Return {yes_said} if {if_said}, otherwise {no_said}.",
            f"If {if_said}, return {yes_said}, otherwise {no_said}.",
            f"Return {yes_said} if {if_said} and {no_said} otherwise.",
            f"If {if_said}, return {yes_said}. Otherwise return {no_said}.",
            f"Return {yes_said} when {if_said}, else {no_said}.",
        )
    )
    body = (f"if {test}:", f"    return {yes}", f"return {no}")
    key = f"branch{len(names)} {condition[0]} {then[0]} {other[0]}"
    return Branch(key, names, docstring, body, ("int",) * len(names), [then[0], "or", other[0]])
