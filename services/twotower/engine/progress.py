"""Whether an engine makes progress: a forward that never returns cannot be interrupted, only noticed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from twotower.errors import EngineStuck
from twotower.tasks import end_process

FACTOR = 20.0
"""How much longer than the longest forward seen one may take."""
LOOK_S = 0.25


class Progress:
    """Written by the engine's thread, and read by the event loop."""

    def __init__(self, floor_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        """floor_s: a forward may always take this long."""
        self._floor_s = floor_s
        self._clock = clock
        self._since: float | None = None
        self._longest_s = 0.0
        self.forwards = 0
        """Forwards finished."""

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Around a forward."""
        self._since = began = self._clock()
        try:
            yield
        finally:
            self._since = None
            self._longest_s = max(self._longest_s, self._clock() - began)
            self.forwards += 1

    @property
    def overdue_s(self) -> float:
        """How far the forward under way is beyond what is to be expected; 0 if it is not."""
        since = self._since
        if since is None:
            return 0.0
        return max(0.0, self._clock() - since - max(self._floor_s, FACTOR * self._longest_s))

    async def watch(self) -> None:
        """Until cancelled; raises EngineStuck when a forward is overdue."""
        while True:
            await asyncio.sleep(LOOK_S)
            if self.overdue_s:
                raise EngineStuck(f"a forward has not returned for {self._clock() - (self._since or 0.0):.0f} s")

    async def guard(self) -> None:
        """Until cancelled; the process ends when a forward is overdue, whatever else it is at.

        The thread that hangs cannot be ended, and would be waited for. With the process go its links, and so its sessions.
        """
        try:
            await self.watch()
        except EngineStuck as error:
            end_process(str(error))
