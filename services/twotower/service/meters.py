"""What happened of late, in two numbers: a rate and a mean that forget. Pure; the caller gives the time."""

from __future__ import annotations

import math

MEMORY_S = 20.0
"""What happened this long ago counts for a third of what happens now."""


class Rate:
    """Events a second, of late."""

    def __init__(self, memory_s: float = MEMORY_S) -> None:
        self._memory_s = memory_s
        self._value = 0.0
        self._at = 0.0

    def add(self, count: float, now: float) -> None:
        """`count` events at `now`, in seconds."""
        self._value = self.per_s(now) + count / self._memory_s
        self._at = now

    def per_s(self, now: float) -> float:
        """The rate at `now`."""
        return self._value * math.exp(-max(0.0, now - self._at) / self._memory_s)


class Mean:
    """The mean of what was added, of late; it stays where it is while nothing comes."""

    def __init__(self, memory_s: float = MEMORY_S) -> None:
        self._memory_s = memory_s
        self._sum = self._weight = 0.0
        self._at = 0.0

    def add(self, value: float, now: float, weight: float = 1.0) -> None:
        """One value, measured at `now`, in seconds."""
        fade = math.exp(-max(0.0, now - self._at) / self._memory_s)
        self._sum = self._sum * fade + value * weight
        self._weight = self._weight * fade + weight
        self._at = now

    @property
    def value(self) -> float:
        """0 while nothing was added."""
        return self._sum / self._weight if self._weight else 0.0
