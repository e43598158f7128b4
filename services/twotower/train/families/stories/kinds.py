"""The kinds of word problems. Solutions contain no random choice: all variety is in the question."""

from __future__ import annotations

import itertools
from collections.abc import Callable

from twotower.train.families.stories import words
from twotower.train.families.stories.story import Problem, Story

EVENTS = (1, 1, 2, 2, 3, 3, 4, 4, 5)
"""The numbers of events of an inventory, one of which is drawn."""

TABLE = (2, 9)
"""The range of the factors of products."""


def inventory(s: Story) -> Problem:
    """A person's things, gained and lost."""
    name, other = s.rng.sample(words.NAMES, 2)
    thing, box = s.rng.choice(words.THINGS), s.rng.choice(words.BOXES)
    events = s.rng.choice(EVENTS)
    if s.rng.random() < 0.5:
        a, b = s.number(*TABLE), s.number(*TABLE)
        s.tell(
            s.pick(
                f"{name} has {a} {box} with {b} {thing} in each.",
                f"{name} has {a} {box} of {b} {thing}.",
                f"{name} owns {a} {box}, each with {b} {thing}.",
            )
        )
        have = s.work(f"{name} has {a} {box} of {b} {thing}", a, "*", b, thing)
    else:
        have = s.number(3, 40)
        s.tell(s.pick(f"{name} has {have} {thing}.", f"{name} starts with {have} {thing}.", f"{name} owns {have} {thing}."))
    while events > 0:
        day = s.day()
        who = s.pick(f"On {day} {name}", f"On {day} {words.pronoun(name).lower()}")
        kind = s.pick("gain", "gain", "lose", "lose", "lose", "boxes", "boxes", "times")
        if kind == "boxes":
            a, b = s.number(*TABLE), s.number(*TABLE)
            s.tell(s.pick(f"{who} buys {a} {box} of {b} {thing}.", f"{who} gets {a} more {box} with {b} {thing} in each."))
            more = s.work(f"on {day} {a} {box} of {b} {thing} come in", a, "*", b, thing)
            have = s.work(f"{name} gets these {more} more {thing}", have, "+", more, thing)
            events -= 1
        elif kind == "times" and have <= s.max_number // 2:
            a = s.number(2, 3)
            s.tell(
                s.pick(f"{who} makes the number of {thing} {a} times as big.", f"{who} ends up with {a} times as many {thing}.")
            )
            have = s.work(f"on {day} {name} has {a} times as many {thing}", have, "*", a, thing)
        elif kind == "gain":
            a, verb = s.number(2, 20), s.pick("buys", "finds", "gets", "picks", "wins")
            s.tell(s.pick(f"{who} {verb} {a} more {thing}.", f"{who} {verb} {a} more.", f"{who} {verb} another {a} {thing}."))
            have = s.work(f"on {day} {name} {verb} {a} more {thing}", have, "+", a, thing)
        else:
            a = s.number(2, min(20, have - 1))
            if s.rng.random() < 0.5:
                s.tell(
                    s.pick(
                        f"{who} gives {a} {thing} to {other}.",
                        f"{who} gives {a} to {other}.",
                        f"{who} gives {other} {a} {thing}.",
                    )
                )
                have = s.work(f"on {day} {name} gives {a} {thing} to {other}", have, "-", a, thing)
            else:
                verb = s.pick("loses", "sells", "uses")
                s.tell(s.pick(f"{who} {verb} {a} {thing}.", f"{who} {verb} {a} of them."))
                have = s.work(f"on {day} {name} {verb} {a} {thing}", have, "-", a, thing)
        events -= 1
    return s.ask(
        s.pick(
            f"How many {thing} does {name} have now?",
            f"How many {thing} does {name} have in the end?",
            f"How many {thing} are there now?",
            f"How many {thing} does {name} have?",
            f"How many {thing} does {name} have left?",
            f"How many {thing} are left?",
        )
    )


def comparison(s: Story) -> Problem:
    """Several people's things, each person compared with the one before."""
    people = s.rng.sample(words.NAMES, s.rng.choice((2, 3, 3)))
    thing, verb = s.rng.choice(words.THINGS), s.pick("has", "has", "collects", "counts")
    have = s.number(3, 30)
    s.tell(f"{people[0]} {verb} {have} {thing}.")
    amounts = [have]
    for before, name in itertools.pairwise(people):
        kind = s.pick("more", "less", "times")
        if kind == "more":
            a = s.number(2, 20)
            s.tell(s.pick(f"{name} {verb} {a} more {thing} than {before}.", f"{name} {verb} {a} more than {before}."))
            have = s.work(f"{name} {verb} {a} more {thing} than {before}", have, "+", a, thing)
        elif kind == "less":
            a = s.number(2, min(20, have - 1))
            s.tell(s.pick(f"{name} {verb} {a} fewer {thing} than {before}.", f"{name} {verb} {a} fewer than {before}."))
            have = s.work(f"{name} {verb} {a} fewer {thing} than {before}", have, "-", a, thing)
        else:
            a = s.number(2, 3)
            s.tell(
                s.pick(f"{name} {verb} {a} times as many {thing} as {before}.", f"{name} {verb} {a} times as many as {before}.")
            )
            have = s.work(f"{name} {verb} {a} times as many {thing} as {before}", have, "*", a, thing)
        amounts.append(have)
    if len(people) == 3 and s.rng.random() < 0.2:
        return s.ask(f"How many {thing} does {people[-1]} have?")
    total = amounts[0]
    for before, name, amount in zip(people, people[1:], amounts[1:], strict=False):
        first = before if before == people[0] else "the others"
        total = s.work(f"we add the {thing} of {first} and {name}", total, "+", amount, thing)
    return s.ask(
        s.pick(
            f"How many {thing} do they have together?",
            f"How many {thing} do they have in all?",
            f"How many {thing} are there altogether?",
        )
    )


def shopping(s: Story) -> Problem:
    """Things at a price, a sum, sometimes with change."""
    name = s.rng.choice(words.NAMES)
    (one, many), (one2, many2) = s.rng.sample(words.GOODS, 2)
    price, price2, n, n2 = s.number(2, 9), s.number(2, 9), s.number(*TABLE), s.number(*TABLE)
    she = s.pick(name, words.pronoun(name))
    s.tell(
        s.pick(
            f"A {one} costs {price} dollars and a {one2} costs {price2} dollars.",
            f"One {one} costs {price} dollars. One {one2} costs {price2} dollars.",
            f"A shop sells each {one} for {price} dollars and each {one2} for {price2} dollars.",
        )
    )
    s.tell(s.pick(f"{name} buys {n} {many} and {n2} {many2}.", f"{name} takes {n} {many} and {n2} {many2}."))
    first = s.work(f"{n} {many} at {price} dollars each cost money", n, "*", price, "dollars")
    second = s.work(f"{n2} {many2} at {price2} dollars each cost money", n2, "*", price2, "dollars")
    total = s.work(f"{name} pays for the {many} and the {many2}", first, "+", second, "dollars")
    if s.rng.random() < 0.5:
        cash = s.number(total + 1, min(s.max_number, total + 20))
        s.tell(s.pick(f"{she} has {cash} dollars.", f"{she} takes along {cash} dollars."))
        s.work(f"{name} has {cash} dollars and spends {total} dollars", cash, "-", total, "dollars")
        return s.ask(
            s.pick(
                f"How many dollars does {name} have left?",
                "How many dollars are left?",
                f"How much money does {name} have left?",
            )
        )
    return s.ask(
        s.pick(f"How many dollars does {name} pay?", f"How much does {name} pay in all?", f"How much money does {name} spend?")
    )


def rate(s: Story) -> Problem:
    """A number a day, for a number of days."""
    name = s.rng.choice(words.NAMES)
    verb, things = s.rng.choice(words.WORK)
    a, days = s.number(*TABLE), s.number(*TABLE)
    unit = s.pick("day", "hour", "week")
    she = s.pick(name, words.pronoun(name))
    s.tell(
        s.pick(
            f"{name} {verb} {a} {things} every {unit}. {she} does this for {days} {unit}s.",
            f"{name} {verb} {a} {things} a {unit} for {days} {unit}s.",
            f"For {days} {unit}s, {name} {verb} {a} {things} each {unit}.",
        )
    )
    done = s.work(f"{name} {verb} {a} {things} a {unit} for {days} {unit}s", a, "*", days, things)
    kind = s.pick("plain", "more", "goal", "both", "both")
    if kind in ("more", "both"):
        extra = s.number(2, 20)
        s.tell(s.pick(f"{she} {verb} {extra} more {things} after that.", f"Then {name} {verb} {extra} more {things}."))
        done = s.work(f"{name} {verb} {extra} more {things}", done, "+", extra, things)
    if kind in ("more", "plain"):
        return s.ask(s.pick(f"How many {things} is that in all?", f"How many {things} is that altogether?"))
    goal = s.number(done + 1, min(s.max_number, done + 20))
    s.tell(s.pick(f"The goal is {goal} {things}.", f"In all, {goal} {things} are needed."))
    s.work(f"the goal is {goal} {things} and {done} are done", goal, "-", done, things)
    return s.ask(
        s.pick(f"How many {things} are left?", f"How many more {things} are needed?", f"How many {things} are still to go?")
    )


def places(s: Story) -> Problem:
    """Rows of seats or the like, some taken, some freed."""
    place, row, seat = s.rng.choice(words.PLACES)
    a, b = s.number(*TABLE), s.number(*TABLE)
    s.tell(s.pick(f"A {place} has {a} {row} of {b} {seat}.", f"There are {a} {row} with {b} {seat} in each in a {place}."))
    left = s.work(f"the {place} has {a} {row} of {b} {seat}", a, "*", b, seat)
    for _ in range(s.rng.choice((0, 1, 1, 2, 2, 3, 3))):
        day, add = s.day(), s.rng.random() < 0.35
        n = s.number(2, 20 if add else min(20, left - 1))
        if add:
            s.tell(s.pick(f"On {day} {n} more {seat} are added.", f"On {day} {n} {seat} are added."))
            left = s.work(f"on {day} {n} {seat} are added", left, "+", n, seat)
        else:
            s.tell(s.pick(f"On {day} {n} {seat} are taken away.", f"On {day} {n} of the {seat} are taken away."))
            left = s.work(f"on {day} {n} {seat} are taken away", left, "-", n, seat)
    return s.ask(
        s.pick(
            f"How many {seat} are there now?",
            f"How many {seat} does the {place} have now?",
            f"How many {seat} are in the {place}?",
        )
    )


KINDS: tuple[Callable[[Story], Problem], ...] = (inventory, inventory, inventory, comparison, shopping, rate, places)
"""Functions that make a problem from a fresh story, or raise ImpossibleError."""
