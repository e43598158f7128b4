"""Requests that are held until there is a replica for them: while a first one starts, or one that is alone restarts."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from twotower.errors import DeadlineExceeded, Unavailable

LOOK_S = 0.1


class Holding:
    """The requests that wait for one kind of replica. Used in the event loop only."""

    def __init__(self, live: Callable[[], int], limit_s: float, otherwise: str) -> None:
        """live: replicas that take sessions; limit_s: how long a request waits; otherwise: what it is told then."""
        self._live = live
        self._limit_s = limit_s
        self._otherwise = otherwise
        self._since: dict[object, float] = {}

    def __len__(self) -> int:
        return len(self._since)

    def oldest_s(self) -> float:
        """How long the oldest has waited."""
        return max(0.0, asyncio.get_running_loop().time() - min(self._since.values())) if self._since else 0.0

    async def wait(self, deadline: float | None) -> None:
        """Until there is a replica. `deadline`: by the loop's clock. Raises Unavailable, DeadlineExceeded."""
        if self._live():
            return
        clock, place = asyncio.get_running_loop().time, object()
        self._since[place] = begun = clock()
        try:
            while not self._live():
                now = clock()
                if now - begun >= self._limit_s:
                    raise Unavailable(f"{self._otherwise} within {self._limit_s:g} s")
                if deadline is not None and now >= deadline:
                    raise DeadlineExceeded("the deadline passed before the answer came")
                await asyncio.sleep(LOOK_S if deadline is None else min(LOOK_S, max(0.0, deadline - now)))
        finally:
            del self._since[place]
