"""Whose fault a failing forward is: the batch is run again in halves, until what fails alone is found."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

log = logging.getLogger(__name__)

T = TypeVar("T")

MAX_FAILURES = 3
"""Sessions that may fail alone, one after the other and without any success between: then the device is at fault."""


class Isolation(Generic[T]):
    """Runs forwards of many sessions, and fails only those that fail alone."""

    def __init__(self, what: str, name_of: Callable[[T], str]) -> None:
        """what: the forward's name, for the log. name_of: of a session, equal for the same one."""
        self._what = what
        self._name_of = name_of
        self._failing: set[str] = set()

    def run(self, items: Sequence[T], forward: Callable[[Sequence[T]], None]) -> list[tuple[T, Exception]]:
        """Call `forward` with all items, in one or more parts; returns the items on which it fails by themselves.

        `forward` must change nothing when it raises. Raises what it raised when one session after the other fails alone.
        """
        try:
            forward(items)
        except Exception as error:
            if len(items) == 1:
                self.blame(items[0], error)
                return [(items[0], error)]
            log.warning("a %s of %d sessions failed, and is tried in halves: %s", self._what, len(items), error)
        else:
            self.clear()
            return []
        half = len(items) // 2
        return self.run(items[:half], forward) + self.run(items[half:], forward)

    def clear(self) -> None:
        """A forward has succeeded."""
        self._failing.clear()

    def blame(self, item: T, error: Exception) -> None:
        """A session has failed alone. Raises `error` if too many have, one after the other."""
        name = self._name_of(item)
        log.error("a %s of session %s alone failed", self._what, name, exc_info=error)
        self._failing.add(name)
        if len(self._failing) >= MAX_FAILURES:
            raise error
