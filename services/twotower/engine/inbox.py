"""What reaches an engine's loop from outside: entries that it takes between two iterations, and at no other time."""

from __future__ import annotations

import queue
from typing import Generic, TypeVar

T = TypeVar("T")


class Inbox(Generic[T]):
    """Entries in the order in which they came. Any thread may put; the loop's own takes."""

    def __init__(self) -> None:
        self._entries: queue.SimpleQueue[T] = queue.SimpleQueue()

    def put(self, *entries: T) -> None:
        """Leave entries for the loop."""
        for entry in entries:
            self._entries.put(entry)

    def take(self, wait_s: float | None) -> list[T]:
        """All entries that are here; without any, waits for the first: at most `wait_s` seconds, None: for ever."""
        entries: list[T] = []
        try:
            entries.append(self._entries.get(block=wait_s != 0, timeout=wait_s or None))
            while True:
                entries.append(self._entries.get_nowait())
        except queue.Empty:
            return entries
