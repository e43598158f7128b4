"""Who waits for state memory: by priority, then by arrival. Pure."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from twotower.request import Priority

T = TypeVar("T")


class WaitingLine(Generic[T]):
    """A line in which what comes first and does not fit holds up what comes later, so that nobody starves."""

    def __init__(self) -> None:
        self._line: list[tuple[int, int, str]] = []
        self._items: dict[str, T] = {}
        self._arrivals = itertools.count()

    def __len__(self) -> int:
        return len(self._items)

    def add(self, name: str, item: T, priority: Priority = Priority.NORMAL) -> None:
        """Join the line."""
        self._items[name] = item
        heapq.heappush(self._line, (-priority, next(self._arrivals), name))

    def leave(self, name: str) -> T | None:
        """Leave the line; returns the item, or None if it is not here."""
        item = self._items.pop(name, None)
        if len(self._line) > 2 * len(self._items) + 16:  # those who left behind one who does not fit
            self._line = [place for place in self._line if place[2] in self._items]
            heapq.heapify(self._line)
        return item

    def admit(self, fits: Callable[[T], bool]) -> Iterator[T]:
        """Take items off the front while they fit; each is yielded, to be admitted, before the next one is asked about."""
        while self._line:
            name = self._line[0][2]
            if name in self._items:
                if not fits(self._items[name]):
                    return
                heapq.heappop(self._line)
                yield self._items.pop(name)
            else:
                heapq.heappop(self._line)
