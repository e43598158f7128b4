"""Which prefixes a tier holds, and which of them are evicted when it is full: a segmented LRU. No torch, no Redis.

An entry begins on *probation*, and becomes *protected* when its prefix is seen again. Entries on probation are evicted
first, so that prompts which come once, however many, never evict one that repeats. Protected entries may fill all but
`probation_share` of the bytes; beyond that, the least recently used one goes back on probation, where it has a last
chance. Entries on probation may use all bytes that protected ones leave free.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Generic, NamedTuple, TypeVar

from twotower.prefix.stats import TierStats

V = TypeVar("V")


class LruSegment(StrEnum):
    """The segment of an entry."""

    PROBATION = "probation"
    PROTECTED = "protected"


@dataclass(slots=True, eq=False)
class IndexEntry(Generic[V]):
    """A held prefix. Only its index changes it."""

    link: bytes
    value: V
    num_bytes: int
    segment: LruSegment
    pins: int = 0
    """The number of its present users; it is not evicted while there is one."""


class IndexMatch(NamedTuple, Generic[V]):
    """The longest prefix that was found."""

    chunks: int
    entry: IndexEntry[V]


@dataclass(slots=True)
class _LruSegment(Generic[V]):
    idle: OrderedDict[bytes, IndexEntry[V]] = field(default_factory=OrderedDict)
    """Entries without users, the least recently used first."""
    pinned: OrderedDict[bytes, IndexEntry[V]] = field(default_factory=OrderedDict)
    held_bytes: int = 0
    idle_bytes: int = 0

    def add(self, entry: IndexEntry[V]) -> None:
        """Add an entry as the most recently used."""
        (self.pinned if entry.pins else self.idle)[entry.link] = entry
        self.held_bytes += entry.num_bytes
        self.idle_bytes += 0 if entry.pins else entry.num_bytes

    def remove(self, entry: IndexEntry[V]) -> None:
        del (self.pinned if entry.pins else self.idle)[entry.link]
        self.held_bytes -= entry.num_bytes
        self.idle_bytes -= 0 if entry.pins else entry.num_bytes

    def oldest(self) -> IndexEntry[V] | None:
        """The least recently used entry without users."""
        return next(iter(self.idle.values()), None)

    def newest_first(self) -> Iterator[IndexEntry[V]]:
        yield from reversed(self.pinned.values())
        yield from reversed(self.idle.values())


class PrefixIndex(Generic[V]):
    """Entries by link, at most `capacity` bytes. Use it on one thread only."""

    def __init__(
        self,
        capacity: int,
        chunk_tokens: int,
        on_evict: Callable[[IndexEntry[V]], object],
        *,
        probation_share: float = 0.2,
        stats: TierStats | None = None,
    ) -> None:
        """`on_evict` is called with each evicted entry, after its removal; it must not call the index.

        `probation_share`: the share of the bytes, in (0, 1], that protected entries leave to those on probation.
        """
        self.capacity = capacity
        self.stats = TierStats() if stats is None else stats
        self._chunk_tokens = chunk_tokens
        self._on_evict = on_evict
        self._protected_limit = capacity - int(capacity * probation_share)
        self._entries: dict[bytes, IndexEntry[V]] = {}
        self._segments: dict[LruSegment, _LruSegment[V]] = {segment: _LruSegment() for segment in LruSegment}

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, link: bytes) -> bool:
        return link in self._entries

    @property
    def held_bytes(self) -> int:
        """The bytes of all entries."""
        return sum(segment.held_bytes for segment in self._segments.values())

    def get(self, link: bytes) -> IndexEntry[V] | None:
        """An entry, without counting this as a use of it."""
        return self._entries.get(link)

    def longest(self, chain: Sequence[bytes]) -> IndexMatch[V] | None:
        """The entry that covers most chunks of a prompt, which becomes protected. Counts a hit or a miss."""
        for chunks in range(len(chain), 0, -1):
            entry = self._entries.get(chain[chunks - 1])
            if entry is not None:
                self._use(entry, LruSegment.PROTECTED)
                self.stats.hits += 1
                self.stats.hit_tokens += chunks * self._chunk_tokens
                return IndexMatch(chunks, entry)
        self.stats.misses += 1
        return None

    def put(self, link: bytes, value: V, num_bytes: int, *, protected: bool = False) -> bool:
        """Hold `value` under `link`; returns False if it is not taken.

        It is not taken if that would evict entries that are in use or, unless the new one is itself to be `protected`
        (its prefix is known to repeat), protected ones; nor if the link is there already, which counts as seeing
        its prefix again.
        """
        if (known := self._entries.get(link)) is not None:
            self._use(known, LruSegment.PROTECTED)
            return False
        segments = tuple(LruSegment) if protected else (LruSegment.PROBATION,)
        needed = self.held_bytes + num_bytes - self.capacity
        if needed > sum(self._segments[segment].idle_bytes for segment in segments):
            return False
        self._evict(needed, segments)
        entry = IndexEntry(link, value, num_bytes, LruSegment.PROTECTED if protected else LruSegment.PROBATION)
        self._entries[link] = entry
        self._segments[entry.segment].add(entry)
        self._settle()
        return True

    def pin(self, entry: IndexEntry[V]) -> None:
        """Add a user of the entry, which is not evicted until `unpin` has been called as often as `pin`."""
        self._segments[entry.segment].remove(entry)
        entry.pins += 1
        self._segments[entry.segment].add(entry)

    def unpin(self, entry: IndexEntry[V]) -> None:
        """Remove a user of the entry; after the last one, the entry counts as the most recently used."""
        if entry.pins < 1:
            raise ValueError("the entry is not pinned")
        self._segments[entry.segment].remove(entry)
        entry.pins -= 1
        self._segments[entry.segment].add(entry)
        self._settle()

    def free(self, num_bytes: int) -> int:
        """Evict entries of at least `num_bytes` in all, protected ones last; returns the bytes that were freed."""
        return self._evict(num_bytes, tuple(LruSegment))

    def newest(self, limit: int) -> list[bytes]:
        """Up to `limit` links to announce: protected entries, then those on probation, each the most recently used first."""
        links: list[bytes] = []
        for segment in (LruSegment.PROTECTED, LruSegment.PROBATION):
            for entry in self._segments[segment].newest_first():
                if len(links) == limit:
                    return links
                links.append(entry.link)
        return links

    def _use(self, entry: IndexEntry[V], segment: LruSegment) -> None:
        """Move an entry to the end of a segment."""
        self._segments[entry.segment].remove(entry)
        entry.segment = segment
        self._segments[segment].add(entry)
        self._settle()

    def _settle(self) -> None:
        """Move entries back on probation while protected ones hold too many bytes, and update the statistics."""
        protected = self._segments[LruSegment.PROTECTED]
        while protected.held_bytes > self._protected_limit and (entry := protected.oldest()) is not None:
            protected.remove(entry)
            entry.segment = LruSegment.PROBATION
            self._segments[LruSegment.PROBATION].add(entry)
        self.stats.bytes = self.held_bytes

    def _evict(self, needed: int, segments: Sequence[LruSegment]) -> int:
        freed = 0
        for name in segments:
            segment = self._segments[name]
            while freed < needed and (entry := segment.oldest()) is not None:
                segment.remove(entry)
                del self._entries[entry.link]
                freed += entry.num_bytes
                self.stats.evictions[name.value] += 1
                self.stats.bytes = self.held_bytes
                self._on_evict(entry)
        return freed
