"""The kinds of word problems. Solutions contain no random choice: all variety is in the question."""

from __future__ import annotations

import itertools
from collections.abc import Callable

from twotower.train.families.math import words
from twotower.train.families.math.inventory import inventory
from twotower.train.families.math.story import ImpossibleError, Problem, Story


def comparison(s: Story) -> Problem:
    """Several people's things, each person compared with the one before."""
    people = [s.name()]
    for _ in range(s.number(1, 3)):
        people.append(s.name(*people))
    thing, verb = s.thing(), s.pick("has", "has", "has", "collects", "counts", "finds", "owns")
    have = s.number(2, s.rng.choice((20, 40, 100)))
    s.tell(f"{people[0]} {verb} {s.shown(have)} {thing}.")
    amounts = [have]
    for before, name in itertools.pairwise(people):
        kind = s.pick("more", "more", "less", "less", "times", "half")
        than = s.pick(f" than {before}", f" {thing} than {before}")
        many = s.pick("", f" {thing}")
        if kind == "more":
            a = s.amount(s.max_number - have)
            s.tell(f"{name} {verb} {s.shown(a)} more{than}.")
            have = s.gain(have, a)
        elif kind == "less":
            a = s.amount(have - 1)
            s.tell(f"{name} {verb} {s.shown(a)} {s.pick('fewer', 'fewer', 'less')}{than}.")
            have = s.lose(have, a)
        elif kind == "times":
            a = s.number(2, min(5, s.max_number // have))
            often = {2: "twice", 3: s.pick("3 times", "three times")}.get(a, f"{a} times")
            s.tell(f"{name} {verb} {often} as many{many} as {before}.")
            have = s.times(have, a)
        else:
            if have % 2:
                raise ImpossibleError
            s.tell(f"{name} {verb} half as many{many} as {before}.")
            have = s.share(have, 2)
        amounts.append(have)
    ending = s.pick("last", "together", "together")
    if ending == "last":
        return s.ask(s.pick(f"How many {thing} does {people[-1]} have?", f"How many does {people[-1]} have?"))
    total = amounts[0]
    for amount in amounts[1:]:
        total = s.together(total, amount)
    return s.ask(_altogether(s, thing, "they"))


def _altogether(s: Story, thing: str, they: str) -> str:
    return s.pick(
        f"How many {thing} do {they} have together?",
        f"How many {thing} do {they} have in all?",
        f"How many {thing} do {they} have altogether?",
        f"How many {thing} do {they} have in total?",
        f"How many {thing} are there altogether?",
        f"How many {thing} are there in all?",
    )


def given(s: Story) -> Problem:
    """Two or three people with their own things: a sum, or a difference."""
    people = [s.name()]
    for _ in range(s.number(1, 2)):
        people.append(s.name(*people))
    thing = s.thing()
    amounts = [s.number(1, s.rng.choice((20, 50, 90))) for _ in people]
    verb = s.pick("has", "has", "finds", "picks", "buys", "owns", "sells", "makes")
    parts = [f"{name} {verb} {s.shown(n)} {thing}" for name, n in zip(people, amounts, strict=True)]
    if s.chance(0.4):
        s.tell(", ".join(parts[:-1]) + " and " + parts[-1] + ".")
    else:
        for part in parts:
            s.tell(part + ".")
    if len(people) == 2 and s.chance(0.4):
        (a, b), (more, less) = amounts, people
        if a < b:
            a, b, more, less = b, a, less, more
        s.difference(a, b)
        return s.ask(
            s.pick(
                f"How many more {thing} does {more} have than {less}?",
                f"How many fewer {thing} does {less} have than {more}?",
                f"How many more does {more} have than {less}?",
            )
        )
    total = amounts[0]
    for amount in amounts[1:]:
        total = s.together(total, amount)
    return s.ask(_altogether(s, thing, s.pick("they", " and ".join([", ".join(people[:-1]), people[-1]]))))


def shopping(s: Story) -> Problem:
    """Things at a price, sometimes of two kinds, sometimes with change."""
    name = s.name()
    (one, many), (one2, many2) = s.rng.sample(words.GOODS, 2)
    she, money = name, s.pick("dollars", "dollars", "dollars", "euros", "coins")
    n, price = s.factors()
    kinds = s.pick("one", "two", "two")
    n2, price2 = s.factors() if kinds == "two" else (0, 0)
    cash_first = s.chance(0.3)
    before = s.rng.random() < 0.5
    spent = n * price + n2 * price2
    cash = s.number(spent, min(s.max_number, spent + 40)) if before else 0
    if before and cash_first:
        s.tell(f"{name} has {cash} {money}.")
        she = s.she(name)
    if kinds == "one":
        s.tell(
            s.pick(
                f"{she} buys {s.shown(n)} {many} for {price} {money} each.",
                f"A {one} costs {price} {money}. {she} buys {s.shown(n)} {many}.",
                f"{she} buys {s.shown(n)} {many}. Each {one} costs {price} {money}.",
                f"{she} buys {s.shown(n)} {many} at {price} {money} each.",
            )
        )
        total = s.groups(n, price)
    else:
        s.tell(
            s.pick(
                f"A {one} costs {price} {money} and a {one2} costs {price2} {money}.",
                f"One {one} costs {price} {money}. One {one2} costs {price2} {money}.",
                f"A shop sells each {one} for {price} {money} and each {one2} for {price2} {money}.",
                f"A {one} is {price} {money} and a {one2} is {price2} {money}.",
            )
        )
        s.tell(
            s.pick(
                f"{she} buys {s.shown(n)} {many} and {s.shown(n2)} {many2}.",
                f"{she} takes {s.shown(n)} {many} and {s.shown(n2)} {many2}.",
            )
        )
        first = s.groups(n, price)
        total = s.together(first, s.groups(n2, price2))
    if not before:
        return s.ask(
            s.pick(
                f"How many {money} does {name} pay?",
                f"How many {money} does {name} spend?",
                f"How much does {name} pay in all?",
                f"How much money does {name} spend?",
                "How much does it cost?",
                f"How many {money} does it cost altogether?",
            )
        )
    if not cash_first:
        who = s.she(name)
        s.tell(s.pick(f"{who} has {cash} {money}.", f"{who} takes along {cash} {money}.", f"{who} pays with {cash} {money}."))
    s.lose(cash, total)
    return s.ask(
        s.pick(
            f"How many {money} does {name} have left?",
            f"How many {money} are left?",
            f"How much money does {name} have left?",
            f"How much change does {name} get?",
        )
    )


def rate(s: Story) -> Problem:
    """A number a day, for a number of days."""
    name = s.name()
    verb, things = s.rng.choice(words.WORK)
    a, days = s.factors()
    unit = s.pick("day", "day", "hour", "week", "minute", "month")
    she = s.pick(name, s.she(name))
    x, y = s.shown(a), s.shown(days)
    s.tell(
        s.pick(
            f"{name} {verb} {x} {things} every {unit}. {she} does this for {y} {unit}s.",
            f"{name} {verb} {x} {things} a {unit} for {y} {unit}s.",
            f"{name} {verb} {x} {things} per {unit} for {y} {unit}s.",
            f"For {y} {unit}s, {name} {verb} {x} {things} each {unit}.",
            f"{name} {verb} {x} {things} each {unit} for {y} {unit}s.",
            f"Every {unit} {name} {verb} {x} {things}, for {y} {unit}s.",
        )
    )
    done = s.groups(days, a)
    kind = s.pick("plain", "more", "goal", "both", "both")
    if kind == "plain":
        return s.ask(
            s.pick(
                f"How many {things} is that in all?", f"How many {things} is that?", f"How many {things} is that altogether?"
            )
        )
    if kind in ("more", "both"):
        extra = s.amount(s.max_number - done)
        s.tell(s.pick(f"{she} {verb} {extra} more {things} after that.", f"Then {name} {verb} {extra} more {things}."))
        done = s.gain(done, extra)
    if kind == "more":
        return s.ask(s.pick(f"How many {things} is that in all?", f"How many {things} is that altogether?"))
    goal = s.number(done + 1, min(s.max_number, done + 40))
    s.tell(
        s.pick(f"The goal is {goal} {things}.", f"In all, {goal} {things} are needed.", f"{s.she(name)} needs {goal} {things}.")
    )
    s.lose(goal, done)
    return s.ask(
        s.pick(f"How many {things} are left?", f"How many more {things} are needed?", f"How many {things} are still to go?")
    )


def places(s: Story) -> Problem:
    """Rows of seats or the like, some taken, some added."""
    place, row, seat = s.rng.choice(words.PLACES)
    a, b = s.factors()
    x, y = s.shown(a), s.shown(b)
    s.tell(
        s.pick(
            f"A {place} has {x} {row} of {y} {seat}.",
            f"A {place} has {x} {row} with {y} {seat} in each.",
            f"There are {x} {row} with {y} {seat} in each in a {place}.",
            f"There are {x} {row} of {y} {seat} in the {place}.",
            f"The {place} has {x} {row}. Each has {y} {seat}.",
        )
    )
    left = s.groups(a, b)
    for _ in range(s.number(0, 4)):
        when = s.when()
        if s.chance(0.4):
            n = s.amount(s.max_number - left)
            s.tell(s.pick(f"{when} {n} more {seat} are added.", f"{when} {n} {seat} are added.", f"{when} {n} more are added."))
            left = s.gain(left, n)
        else:
            n = s.amount(left)
            s.tell(
                s.pick(
                    f"{when} {n} {seat} are taken away.",
                    f"{when} {n} of the {seat} are taken away.",
                    f"{when} {n} of them are taken away.",
                    f"{when} {n} {seat} are removed.",
                    f"{when} {n} of the {seat} are taken.",
                )
            )
            left = s.lose(left, n)
    return s.ask(
        s.pick(
            f"How many {seat} are there now?",
            f"How many {seat} does the {place} have now?",
            f"How many {seat} are in the {place}?",
            f"How many {seat} are left?",
            f"How many {seat} are there?",
        )
    )


def sharing(s: Story) -> Problem:
    """Things divided into equal parts, sometimes after an event."""
    name, thing = s.name(), s.thing()
    n, each = s.factors()
    total = n * each
    kind = s.pick("plain", "gain", "lose", "eat")
    if kind == "gain":
        extra = s.amount(total)
        s.tell(f"{name} has {total - extra} {thing} and buys {extra} more.")
        s.gain(total - extra, extra)
    elif kind == "lose":
        gone = s.amount(s.max_number - total)
        s.tell(f"{name} has {total + gone} {thing} and {s.pick('loses', 'sells', 'eats')} {gone} of them.")
        s.lose(total + gone, gone)
    else:
        s.tell(s.pick(f"{name} has {total} {thing}.", f"There are {total} {thing}.", f"{name} bakes {total} {thing}."))
    she, box = s.she(name), s.rng.choice([b for b in words.BOXES if b != thing])
    question = s.pick(f"How many {thing} does each friend get?", f"How many {thing} does each one get?")
    if s.chance(0.5):
        s.tell(
            s.pick(
                f"{she} shares them equally among {n} friends.",
                f"{she} shares the {thing} equally between {n} friends.",
                f"{n} friends share them equally.",
                f"{she} gives the same number of {thing} to each of {n} friends.",
            )
        )
    else:
        s.tell(
            s.pick(
                f"{she} puts them into {n} {box}, the same number in each.",
                f"{she} splits them equally into {n} {box}.",
                f"They are put into {n} equal {box}.",
            )
        )
        question = s.pick(f"How many {thing} are in each?", f"How many {thing} are there in each of the {box}?")
    part = s.share(total, n)
    if kind == "eat" and part:
        eaten = s.number(1, part)
        s.tell(f"Then {eaten} are eaten from each.")
        s.lose(part, eaten)
        question = s.pick(f"How many {thing} are left in each?", "How many are in each now?")
    return s.ask(question)


def sums(s: Story) -> Problem:
    """A single sum."""
    op = s.pick("+", "-", "*", "/")
    a, b = operands(s, op)
    if op == "+":
        s.together(a, b)
        words_of = (f"What is {a} + {b}?", f"What is {a} plus {b}?", f"Add {a} and {b}.", f"How much is {a} and {b} together?")
    elif op == "-":
        s.difference(a, b)
        words_of = (f"What is {a} - {b}?", f"What is {a} minus {b}?", f"Subtract {b} from {a}.", f"How much is {a} less {b}?")
    elif op == "*":
        s.groups(a, b)
        words_of = (f"What is {a} * {b}?", f"What is {a} times {b}?", f"Multiply {a} by {b}.", f"How much is {a} times {b}?")
    else:
        s.share(a, b)
        words_of = (
            f"What is {a} / {b}?",
            f"What is {a} divided by {b}?",
            f"Divide {a} by {b}.",
            f"How much is {a} divided by {b}?",
        )
    return s.ask(s.rng.choice(words_of))


def operands(s: Story, op: str) -> tuple[int, int]:
    """Two numbers for a sum, uniform over all sums of its kind that stay in range."""
    top = s.max_number
    while True:
        if op in "+-":
            a, b = s.rng.randint(0, top), s.rng.randint(0, top)
            if a + b <= top:
                return (a, b) if op == "+" else (a + b, b)
        else:
            a = s.rng.randint(1, max(1, top // 2))
            b = s.rng.randint(1, top // a)
            if s.chance(0.5):
                a, b = b, a
            return (a, b) if op == "*" else (a * b, b)


KINDS: tuple[tuple[Callable[[Story], Problem], int], ...] = (
    (inventory, 20),
    (comparison, 6),
    (given, 4),
    (shopping, 5),
    (rate, 4),
    (places, 4),
    (sharing, 3),
    (sums, 1),
)
"""Functions that make a problem from a fresh story, or raise ImpossibleError, with their weights."""
