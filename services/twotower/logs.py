"""What a process logs, bounded: whatever comes, and however often, a place in the code writes a line a second at most."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

BURST = 10
"""Lines that one place may write at once."""
LINES_A_SECOND = 1.0


@dataclass(slots=True)
class _Place:
    left: float
    when: float
    dropped: int = 0


class BoundedLog(logging.Filter):
    """For a handler: a place in the code that logs too much loses lines, and the next that passes says how many."""

    def __init__(
        self, burst: int = BURST, lines_a_second: float = LINES_A_SECOND, clock: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__()
        self._burst = burst
        self._rate = lines_a_second
        self._clock = clock
        self._places: dict[tuple[str, str, int], _Place] = {}  # as many as the code has

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether it is written."""
        now, key = self._clock(), (record.name, record.pathname, record.lineno)
        place = self._places.get(key)
        if place is None:
            place = self._places[key] = _Place(self._burst, now)
        place.left = min(self._burst, place.left + (now - place.when) * self._rate)
        place.when = now
        if place.left < 1:
            place.dropped += 1
            return False
        place.left -= 1
        if place.dropped:
            record.msg = f"{record.getMessage()} (and {place.dropped} like it before, not logged)"
            record.args = ()
            place.dropped = 0
        return True
