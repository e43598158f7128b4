"""The segmented LRU: what it promises, and that it does what a plain model of it does."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twotower.prefix.index import IndexEntry, IndexMatch, LruSegment, PrefixIndex
from twotower.prefix.stats import TierStats

CHUNK = 128


def link(number: int) -> bytes:
    return number.to_bytes(16, "little")


class Index(PrefixIndex[int]):
    """Remembers what was evicted."""

    def __init__(self, capacity: int, **options: float) -> None:
        self.evicted: list[int] = []
        super().__init__(capacity, CHUNK, lambda entry: self.evicted.append(entry.value), **options)  # type: ignore[arg-type]

    def add(self, number: int, num_bytes: int = 1, *, protected: bool = False) -> bool:
        return self.put(link(number), number, num_bytes, protected=protected)

    def meet(self, *numbers: int) -> IndexMatch[int] | None:
        return self.longest([link(number) for number in numbers])

    def entry(self, number: int) -> IndexEntry[int]:
        entry = self.get(link(number))
        assert entry is not None
        return entry


def test_the_longest_prefix_is_found_and_counted() -> None:
    index = Index(100)
    for number in (1, 3):
        assert index.add(number, 10)
    assert index.meet(1, 2, 3, 4) == (3, index.entry(3))
    assert index.meet(1, 2) == (1, index.entry(1))
    assert index.meet(2, 4) is None
    assert index.meet() is None
    stats = index.stats
    assert (stats.hits, stats.misses, stats.hit_tokens, stats.bytes) == (2, 2, 4 * CHUNK, 20)
    assert stats.hit_ratio == 0.5


def test_prompts_that_come_once_do_not_flush_one_that_repeats() -> None:
    index = Index(100)
    index.add(0, 30)
    assert index.entry(0).segment is LruSegment.PROBATION
    assert index.meet(0) is not None
    assert index.entry(0).segment is LruSegment.PROTECTED
    for number in range(1, 1000):
        assert index.add(number, 7)
    assert link(0) in index
    assert index.evicted == list(range(1, 990))  # in their order; ten of 7 bytes fit beside the 30
    assert index.stats.evictions == {"probation": 989}


def test_what_no_longer_repeats_makes_way_for_what_does() -> None:
    """Protected entries beyond their share go back on probation, the one unused for longest first."""
    index = Index(100, probation_share=0.2)
    for number in range(10):
        index.add(number, 10)
        index.meet(number)
    assert [index.entry(number).segment for number in range(10)] == [LruSegment.PROBATION] * 2 + [LruSegment.PROTECTED] * 8
    index.add(10, 10)
    assert index.evicted == [0]
    index.meet(1)  # its last chance: it is met again, and 2 gives way to it
    assert [number for number in range(1, 10) if index.entry(number).segment is LruSegment.PROBATION] == [2]


def test_an_entry_known_to_repeat_is_protected_at_once() -> None:
    index = Index(20)
    assert index.add(1, 10, protected=True)
    for number in range(2, 9):
        index.add(number, 10)
    assert link(1) in index


def test_the_same_prefix_twice_keeps_the_first_value_and_protects_it() -> None:
    index = Index(20)
    assert index.add(1)
    assert not index.put(link(1), 99, 5)
    assert (index.entry(1).value, index.entry(1).segment, index.held_bytes) == (1, LruSegment.PROTECTED, 1)


def test_what_does_not_fit_is_not_taken_and_costs_no_one_its_place() -> None:
    index = Index(100)
    index.add(1, 50)
    assert not index.add(2, 101, protected=True)
    index.meet(1)
    assert not index.add(2, 60)  # only a protected one could make room
    assert index.evicted == []
    assert index.add(2, 60, protected=True)  # which one that repeats may ask for
    assert index.evicted == [1]


def test_an_entry_in_use_stays() -> None:
    index = Index(30)
    for number in (1, 2, 3):
        index.add(number, 10)
    one = index.entry(1)
    index.pin(one)
    index.pin(one)
    index.add(4, 10)
    assert index.evicted == [2]
    assert index.free(100) == 20
    assert index.evicted == [2, 3, 4]
    assert not index.add(5, 25)
    index.unpin(one)
    assert index.free(1) == 0
    assert index.add(6, 10)
    index.unpin(one)  # used until now: 6 goes first
    assert index.free(1) == 10
    assert index.evicted == [2, 3, 4, 6]
    with pytest.raises(ValueError, match="not pinned"):
        index.unpin(one)


def test_room_is_made_on_probation_first() -> None:
    index = Index(100)
    index.add(1, 10, protected=True)
    index.add(2, 10)
    index.add(3, 10)
    assert index.free(15) == 20
    assert index.evicted == [2, 3]
    assert index.free(15) == 10
    assert index.stats.evictions == {"probation": 2, "protected": 1}
    assert (len(index), index.held_bytes, index.stats.bytes) == (0, 0, 0)


def test_what_is_announced_first_is_what_repeats_and_was_met_last() -> None:
    index = Index(100)
    for number in range(6):
        index.add(number)
    index.meet(4)
    index.meet(2)
    index.pin(index.entry(1))
    assert index.newest(10) == [link(number) for number in (2, 4, 1, 5, 3, 0)]
    assert index.newest(2) == [link(2), link(4)]


@dataclass
class Plain:
    """An entry of the model."""

    value: int
    size: int
    protected: bool
    used: int
    pins: int = 0


class Model:
    """The same rules, written as plainly as can be: every question looks at everything."""

    def __init__(self, capacity: int, share: float) -> None:
        self.capacity, self.limit = capacity, capacity - int(capacity * share)
        self.held: dict[int, Plain] = {}
        self.evicted: list[int] = []
        self.stats = TierStats()
        self._clock = itertools.count()

    def total(self) -> int:
        return sum(each.size for each in self.held.values())

    def idle(self, protected: bool) -> list[Plain]:
        found = [each for each in self.held.values() if each.protected == protected and not each.pins]
        return sorted(found, key=lambda each: each.used)

    def use(self, each: Plain) -> None:
        each.used = next(self._clock)

    def settle(self) -> None:
        while sum(e.size for e in self.held.values() if e.protected) > self.limit and (idle := self.idle(True)):
            idle[0].protected = False
            self.use(idle[0])

    def meet(self, number: int) -> None:
        self.held[number].protected = True
        self.use(self.held[number])
        self.settle()

    def longest(self, chain: list[int]) -> int:
        found = max((i + 1 for i, number in enumerate(chain) if number in self.held), default=0)
        self.stats.hits += found > 0
        self.stats.misses += found == 0
        self.stats.hit_tokens += found * CHUNK
        if found:
            self.meet(chain[found - 1])
        return found

    def put(self, number: int, size: int, protected: bool) -> bool:
        if number in self.held:
            self.meet(number)
            return False
        victims = self.idle(False) + (self.idle(True) if protected else [])
        if self.total() - sum(each.size for each in victims) + size > self.capacity:
            return False
        self.evict(victims, self.total() + size - self.capacity)
        self.held[number] = Plain(number, size, protected, next(self._clock))
        self.settle()
        return True

    def evict(self, victims: list[Plain], needed: int) -> int:
        freed = 0
        for each in victims:
            if freed >= needed:
                break
            freed += each.size
            self.evicted.append(each.value)
            self.stats.evictions["protected" if each.protected else "probation"] += 1
            del self.held[each.value]
        return freed

    def pin(self, number: int, change: int) -> None:
        self.held[number].pins += change
        if change < 0:
            self.use(self.held[number])
        self.settle()


NUMBERS = st.integers(0, 11)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("put"), NUMBERS, st.integers(1, 12), st.booleans()),
        st.tuples(st.just("longest"), st.lists(NUMBERS, max_size=4, unique=True)),
        st.tuples(st.just("pin"), NUMBERS),
        st.tuples(st.just("unpin"), NUMBERS),
        st.tuples(st.just("free"), st.integers(0, 12)),
    ),
    max_size=80,
)


@settings(max_examples=300, deadline=None)
@given(STEPS, st.integers(5, 30), st.sampled_from([0.1, 0.2, 0.5, 1.0]))
def test_it_does_what_a_plain_model_does(steps: list[tuple[object, ...]], capacity: int, share: float) -> None:
    index, model = Index(capacity, probation_share=share), Model(capacity, share)
    for step in steps:
        match step:
            case ("put", int(number), int(size), bool(protected)):
                assert index.add(number, size, protected=protected) == model.put(number, size, protected)
            case ("longest", list(chain)):
                match = index.meet(*chain)
                assert (match.chunks if match else 0) == model.longest(chain)
            case ("pin", int(number)) if number in model.held:
                index.pin(index.entry(number))
                model.pin(number, 1)
            case ("unpin", int(number)) if number in model.held and model.held[number].pins:
                index.unpin(index.entry(number))
                model.pin(number, -1)
            case ("free", int(size)):
                assert index.free(size) == model.evict(model.idle(False) + model.idle(True), size)
        assert index.evicted == model.evicted
        model.stats.bytes = model.total()
        assert index.stats == model.stats
        assert index.held_bytes == model.total() <= capacity
        assert set(index.newest(100)) == {link(number) for number in model.held}
        for number, each in model.held.items():
            assert (index.entry(number).segment is LruSegment.PROTECTED, index.entry(number).pins) == (
                each.protected,
                each.pins,
            )
