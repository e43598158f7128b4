"""All families by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from twotower.train.families.code.functions import items as code
from twotower.train.families.item import Item, Split
from twotower.train.families.knowledge.questions import items as knowledge
from twotower.train.families.math.problems import items as math

FAMILIES: dict[str, Callable[[Split, int], Iterator[Item]]] = {"math": math, "code": code, "knowledge": knowledge}
"""Name -> an endless stream of tasks of a split, from a seed."""
