"""Functions composed of known parts. A hash of the parts decides which compositions training sees."""

from __future__ import annotations

import builtins
import keyword
import random
from collections.abc import Iterator
from dataclasses import dataclass

from twotower.train.families.code.branches import draw_branch
from twotower.train.families.code.check import FunctionCheck, Signature
from twotower.train.families.code.parts import FILTERS, ITERABLES, MAPS, NOUNS, REDUCES, Filter, Iterable, Map, Reduce
from twotower.train.families.item import SPLITS, Item, Split, in_eval
from twotower.train.families.math.words import made_up

EVAL_SHARE = 8
"""One composition in `EVAL_SHARE` belongs to the evaluation split."""

LETTERS = "abcdefghiklmnoprstuw"

BRANCH_SHARE = 0.25
"""Share of functions that decide between two expressions instead of looping."""

NAMES = ("solve", "compute", "f", "task", "run", "answer", "process", "helper", "work", "make", "get_result", "func")
HINTED = 0.15
"""Share of functions whose parameters have types."""

_HINTS = {"ints": "list[int]", "words": "list[str]", "text": "str", "n": "int", "int": "int"}

MADE_UP = 0.04
"""Share of parameters with a made-up name."""


@dataclass(frozen=True, slots=True)
class Composition:
    """The parts of a function, without its constants and names."""

    iterable: Iterable
    filter: Filter | None
    map: Map | None
    reduce: Reduce

    @property
    def key(self) -> str:
        """A key that is equal for equal compositions."""
        parts = (self.iterable, self.filter, self.map, self.reduce)
        return " ".join(part.name if part else "-" for part in parts)


def split_of(key: str) -> Split:
    """Which split a composition belongs to: train or eval."""
    return "eval" if in_eval(key, EVAL_SHARE) else "train"


def items(split: Split, seed: int) -> Iterator[Item]:
    """An endless stream of functions; equal for equal arguments. No composition occurs in two splits."""
    assert split in SPLITS, split
    rng = random.Random(f"code:{split}:{seed}")
    while True:
        if rng.random() < BRANCH_SHARE:
            branch = draw_branch(rng)
            if split_of(branch.key) == split:
                yield _item(rng, branch.parameters, branch.docstring, branch.body, branch.arguments, branch.words)
        else:
            composition = draw(rng)
            if split_of(composition.key) == split:
                yield _write(rng, composition)


def draw(rng: random.Random) -> Composition:
    """A random composition that makes sense."""
    while True:
        iterable = rng.choice(ITERABLES)
        kept = rng.choice(FILTERS[iterable.kind]) if rng.random() < 0.75 else None
        made = rng.choice(MAPS[iterable.kind]) if rng.random() < 0.6 else None
        reduce = rng.choice(REDUCES)
        element = made.result if made else "int" if iterable.kind == "int" else "str"
        if element not in reduce.kinds or (made and not reduce.mapped):
            continue
        if reduce.name in ("longest", "shortest") and iterable.kind != "word":
            continue
        if reduce.name == "product" and iterable.name == "below" and kept is None:
            continue  # the result would always be 0
        return Composition(iterable, kept, made, reduce)


def _write(rng: random.Random, c: Composition) -> Item:
    parameter = made_up(rng, 2) if rng.random() < MADE_UP else rng.choice(c.iterable.parameters)
    letter = rng.choice(LETTERS)
    noun = rng.choice(NOUNS[c.iterable.kind])
    where = rng.choice(c.iterable.where).format(p=parameter)
    lines = []
    kept, code = "", ""
    if c.filter is not None:
        k = rng.randint(c.filter.low, c.filter.high)
        before = c.filter.adjective and (rng.random() < 0.5 or not c.filter.clause)
        said = rng.choice(c.filter.adjective if before else c.filter.clause).format(k=k, c=letter)
        kept = f"{said} {noun} {where}" if before else f"{noun} {where} {said}"
        if not before and rng.random() < 0.5 and not said.startswith("that"):
            kept = f"{noun} {said} {where}"
        code = c.filter.code.format(k=k, c=letter)
    else:
        kept = f"{noun} {where}"
    expression, elements = "x", kept
    other = rng.choice(LETTERS)
    definite = c.reduce.name not in ("count", "any", "none")
    if c.map is not None:
        k = rng.randint(c.map.low, c.map.high)
        expression = c.map.code.format(k=k, c=other)
        elements = rng.choice(c.map.words).format(e="the " + kept, k=k, c=other)
    elif definite:
        elements = "the " + kept
    said = rng.choice(c.reduce.words).format(e=elements)
    indent = "    "
    if c.reduce.start:
        lines.append(c.reduce.start)
    lines.append(c.iterable.loop.format(p=parameter))
    inner = indent
    if code:
        lines.append(f"{indent}if {code}:")
        inner = 2 * indent
    lines += [inner + line.format(x=expression) for line in c.reduce.body]
    lines.append(c.reduce.end)
    words = [c.reduce.name, *(p.name for p in (c.filter, c.map) if p), noun]
    return _item(rng, (parameter,), _sentence(rng, said), tuple(lines), (c.iterable.argument,), words)


def _sentence(rng: random.Random, what: str) -> str:
    verb = rng.choice(("Return", "Return", "Return", "Compute", "Find", "Give", "Give back", "Calculate", "Work out"))
    if what.startswith(("True", "whether", "how")):
        verb = "Return"
    return f"{verb} {what}."


def _item(
    rng: random.Random,
    parameters: tuple[str, ...],
    docstring: str,
    body: tuple[str, ...],
    arguments: tuple[str, ...],
    words: list[str],
) -> Item:
    name = rng.choice(NAMES) if rng.random() < 0.4 else "_".join(words[: rng.randint(1, len(words))])
    if hasattr(builtins, name) or keyword.iskeyword(name):
        name += "_of"  # the body may call the builtin that it would hide
    hinted = rng.random() < HINTED
    signature = [f"{p}: {_HINTS[a]}" if hinted else p for p, a in zip(parameters, arguments, strict=True)]
    head = f'def {name}({", ".join(signature)}):\n    """{docstring}"""'
    text = "\n".join("    " + line for line in body)
    return Item("code", head, text, FunctionCheck(Signature(name, parameters, arguments), head, text))
