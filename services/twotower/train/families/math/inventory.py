"""A person's things, gained and lost: the commonest kind of word problem."""

from __future__ import annotations

from collections.abc import Callable

from twotower.train.families.math import words
from twotower.train.families.math.story import ImpossibleError, Problem, Story


def inventory(s: Story) -> Problem:
    """A start, then one to five events."""
    teller = _Teller(s)
    have = teller.start()
    events = s.number(1, 5)
    for _ in range(events):
        if s.steps_left == 0:
            break
        have = teller.event(have)
    return s.ask(teller.question())


class _Teller:
    """Who has what, and the wordings for it."""

    def __init__(self, s: Story) -> None:
        self.s = s
        self.name = s.name()
        self.other = s.name(self.name)
        self.thing = s.thing()
        self.box = s.rng.choice([b for b in words.BOXES if b != self.thing])
        self.she = s.she(self.name)
        self._named = False

    def start(self) -> int:
        """State the number of things at the beginning; returns it."""
        s, name, thing, box = self.s, self.name, self.thing, self.box
        if s.chance(0.4):
            a, b = s.factors()
            x, y = s.shown(a), s.shown(b)
            s.tell(
                s.pick(
                    f"{name} has {x} {box} with {y} {thing} in each.",
                    f"{name} has {x} {box} of {y} {thing}.",
                    f"{name} has {x} {box} of {y} {thing}.",
                    f"{name} owns {x} {box}, each with {y} {thing}.",
                    f"{name} has {x} {box} of {y} {thing} each.",
                    f"{name} has {x} {box} with {y} {thing} each.",
                    f"{name} has {x} {box} with {y} {thing} in each {words.singular(box)}.",
                    f"{name} buys {x} {box}. Each {words.singular(box)} has {y} {thing}.",
                    f"{name} has {x} {box}. Each has {y} {thing}.",
                    f"{name} has {x} {box}. There are {y} {thing} in each.",
                    f"There are {y} {thing} in each of {name}'s {x} {box}.",
                    f"{name} buys {x} {box} of {y} {thing}.",
                    f"{name} starts with {x} {box} of {y} {thing}.",
                )
            )
            return s.groups(a, b)
        have = s.number(1, s.rng.choice((20, 50, 100)))
        x = s.shown(have)
        if s.chance(0.06):
            return self._start_with_more(have)
        s.tell(
            s.pick(
                f"{name} has {x} {thing}.",
                f"{name} has {x} {thing}.",
                f"{name} owns {x} {thing}.",
                f"{name} starts with {x} {thing}.",
                f"{name} has {x} {thing} in a box.",
                f"At first {name} has {x} {thing}.",
                f"There are {x} {thing} on {name}'s table.",
                f"{name} keeps {x} {thing} at home.",
                f"{name} begins with {x} {thing}.",
                f"{name} {s.pick('picks', 'buys', 'finds', 'makes')} {x} {thing}.",
                f"In the morning {name} has {x} {thing}.",
            )
        )
        return have

    def _start_with_more(self, have: int) -> int:
        s, name, thing = self.s, self.name, self.thing
        if s.chance(0.5):
            n = s.amount(s.max_number - have)
            s.tell(f"{name} has {s.shown(have)} {thing} and {s.rng.choice(words.GAINS)} {s.shown(n)} more.")
            return s.gain(have, n)
        n = s.amount(have)
        s.tell(f"{name} has {s.shown(have)} {thing} and {s.rng.choice(words.LOSSES)} {s.shown(n)}{s.pick('', ' of them')}.")
        return s.lose(have, n)

    def event(self, have: int) -> int:
        """Add an event; returns the number of things after it. Raises ImpossibleError."""
        often: tuple[Callable[[int], int], ...] = (self._gain,) * 6 + (self._lose,) * 6 + (self._boxes,) * 2
        kinds = (*often, self._boxes_lost, self._both, self._times, self._share, self._half)
        return self.s.rng.choice(kinds)(have)

    def _who(self) -> str:
        """The beginning of an event's sentence."""
        when = self.s.when()
        who = self.s.pick(self.name, self.she) if when == "" else self.s.pick(self.name, self.she.lower())
        return f"{when} {who}"

    def _gain(self, have: int) -> int:
        s, thing, other = self.s, self.thing, self.other
        n = s.amount(s.max_number - have)
        x, who, verb = s.shown(n), self._who(), s.rng.choice(words.GAINS)
        s.tell(
            s.pick(
                f"{who} {verb} {x} more {thing}.",
                f"{who} {verb} {x} more {thing}.",
                f"{who} {verb} {x} more.",
                f"{who} {verb} {x} more.",
                f"{who} {verb} another {x} {thing}.",
                f"{who} {verb} another {x}.",
                f"{who} {verb} {x} {thing}.",
                f"{who} is given {x} {thing}.",
                f"{who} gets {x} {thing} from {other}.",
                f"{who} gets {x} more from {other}.",
                f"{who} gets {x} {thing} as a gift.",
                f"{s.when()} {other} gives {self._them(self.name)} {x} {thing}.",
                f"{s.when()} {other} gives {self.name} {x} more {thing}.",
                f"{s.when()} {other} gives {x} {thing} to {self.name}.",
                f"{who} {verb} {x} new {thing}.",
            )
        )
        return s.gain(have, n)

    def _lose(self, have: int) -> int:
        s, thing, other = self.s, self.thing, self.other
        n = s.amount(have)
        x, who, verb, away = s.shown(n), self._who(), s.rng.choice(words.LOSSES), s.rng.choice(words.AWAY)
        s.tell(
            s.pick(
                f"{who} {verb} {x} {thing}.",
                f"{who} {verb} {x} {thing}.",
                f"{who} {verb} {x} of them.",
                f"{who} {verb} {x} of the {thing}.",
                f"{who} {verb} {x} of {s.her(self.name)} {thing}.",
                f"{who} {verb} {x}.",
                f"{who} {away} {x} {thing}.",
                f"{who} {away} {x} of them.",
                f"{who} {away} {x}.",
                f"{who} gives {x} {thing} to {other}.",
                f"{who} gives {x} to {other}.",
                f"{who} gives {other} {x} {thing}.",
                f"{who} gives {other} {x} of them.",
                f"{who} gives {x} of them to {other}.",
                f"{who} gives {x} {thing} to {s.her(self.name)} {s.pick('brother', 'sister', 'friend', 'mother', 'teacher')}.",
                f"{s.when()} {other} takes {x} of them.",
                f"{s.when()} {x} of the {thing} {s.pick('break', 'are lost', 'get lost', 'are sold', 'fall down')}.",
                f"{who} {verb} {x} of these.",
            )
        )
        return s.lose(have, n)

    def _both(self, have: int) -> int:
        """Two events in one sentence."""
        s, thing, other, who = self.s, self.thing, self.other, self._who()
        first = s.pick("gain", "lose")
        n = s.amount(s.max_number - have if first == "gain" else have - 1)
        between = have + n if first == "gain" else have - n
        x, gain, loss = s.shown(n), s.rng.choice(words.GAINS), s.rng.choice(words.LOSSES)
        if first == "gain":
            m = s.amount(between)
            y = s.shown(m)
            s.tell(
                s.pick(
                    f"{who} {gain} {x} more {thing} and {loss} {y} of them.",
                    f"{who} {gain} {x} more and {loss} {y}.",
                    f"{who} {gain} {x} {thing} and then {loss} {y}.",
                    f"{who} {gain} {x} more and gives {y} to {other}.",
                )
            )
            return s.lose(s.gain(have, n), m)
        if s.chance(0.5):
            m = s.amount(s.max_number - between)
            y = s.shown(m)
            s.tell(
                s.pick(
                    f"{who} {loss} {x} {thing} and {gain} {y} more.",
                    f"{who} {loss} {x} of them and {gain} {y} more.",
                    f"{who} {loss} {x} and then {gain} {y}.",
                    f"{who} gives {x} to {other} and {gain} {y} more.",
                )
            )
            return s.gain(s.lose(have, n), m)
        m = s.amount(between)
        y, third = s.shown(m), s.name(self.name, other)
        s.tell(
            s.pick(
                f"{who} gives {x} {thing} to {other} and {y} to {third}.",
                f"{who} gives {other} {x} {thing} and {third} {y}.",
                f"{who} {loss} {x} {thing} and gives {y} to {other}.",
                f"{who} {loss} {x} and {s.rng.choice([v for v in words.LOSSES if v != loss])} {y}.",
            )
        )
        return s.lose(s.lose(have, n), m)

    def _bought(self) -> tuple[int, int]:
        s, thing, box, who = self.s, self.thing, self.box, self._who()
        a, b = s.factors()
        x, y = s.shown(a), s.shown(b)
        s.tell(
            s.pick(
                f"{who} buys {x} {box} of {y} {thing}.",
                f"{who} buys {x} {box} of {y} {thing} each.",
                f"{who} gets {x} more {box} with {y} {thing} in each.",
                f"{who} buys {x} {box} with {y} {thing} in each.",
                f"{who} gets {x} {box} of {y} {thing} from {self.other}.",
                f"{who} finds {x} {box}, each with {y} {thing}.",
                f"{who} buys {x} more {box} of {y}.",
            )
        )
        return a, b

    def _boxes(self, have: int) -> int:
        a, b = self._bought()
        return self.s.gain(have, self.s.groups(a, b))

    def _boxes_lost(self, have: int) -> int:
        s, thing, box, who = self.s, self.thing, self.box, self._who()
        a, b = s.factors()
        if a * b > have:
            raise ImpossibleError
        x, y = s.shown(a), s.shown(b)
        s.tell(
            s.pick(
                f"{who} sells {x} {box} of {y} {thing}.",
                f"{who} gives {y} {thing} to each of {x} friends.",
                f"{who} gives {x} friends {y} {thing} each.",
                f"{who} uses {x} {box} of {y} {thing}.",
            )
        )
        return s.lose(have, s.groups(a, b))

    def _times(self, have: int) -> int:
        s, thing, who = self.s, self.thing, self._who()
        n = s.number(2, min(4, s.max_number // max(1, have)))
        wordings = [
            f"{who} makes the number of {thing} {n} times as big.",
            f"{who} ends up with {n} times as many {thing}.",
            f"{who} gets {n} times as many {thing} as before.",
        ]
        if n == 2:
            wordings += [f"{who} doubles the number of {thing}.", f"The number of {thing} doubles."]
        if n == 3:
            wordings.append(f"{who} triples the number of {thing}.")
        s.tell(s.pick(*wordings))
        return s.times(have, n)

    def _share(self, have: int) -> int:
        s, thing, who = self.s, self.thing, self._who()
        parts = [n for n in range(2, 13) if have and have % n == 0]
        if not parts:
            raise ImpossibleError
        n = s.rng.choice(parts)
        s.tell(
            s.pick(
                f"{who} shares the {thing} equally among {n} friends, and keeps only what one of them gets.",
                f"{who} puts the {thing} into {n} equal piles and keeps one pile.",
                f"{who} splits the {thing} into {n} equal parts and keeps one part.",
            )
        )
        return s.share(have, n)

    def _half(self, have: int) -> int:
        s, thing, who = self.s, self.thing, self._who()
        if have == 0 or have % 2:
            raise ImpossibleError
        s.tell(
            s.pick(
                f"{who} gives half of the {thing} to {self.other}.",
                f"{who} loses half of them.",
                f"{who} sells half of the {thing}.",
                f"{who} gives away half of {s.her(self.name)} {thing}.",
                f"{who} uses half of them.",
            )
        )
        return s.share(have, 2)

    def question(self) -> str:
        """The question at the end."""
        s, name, thing, she = self.s, self.name, self.thing, self.she.lower()
        return s.pick(
            f"How many {thing} does {name} have now?",
            f"How many {thing} does {name} have now?",
            f"How many {thing} does {name} have in the end?",
            f"How many {thing} are there now?",
            f"How many {thing} does {name} have?",
            f"How many {thing} does {she} have now?",
            f"How many {thing} does {name} have left?",
            f"How many {thing} are left?",
            f"How many {thing} does {she} have?",
            f"How many does {name} have now?",
            f"How many does {she} have left?",
            f"How many {thing} does {name} have left now?",
            f"How many {thing} does {name} have at the end?",
            f"How many {thing} does {name} have altogether?",
        )

    def _them(self, name: str) -> str:
        return "her" if words.is_woman(name) else "him"
