"""Messages about what one forward made: they come one after the other, and what they ask for should share a forward again."""

from __future__ import annotations

import asyncio
from collections.abc import Hashable


class Gathering:
    """Knows who else is about to come. Use it in the event loop only."""

    def __init__(self, patience_s: float) -> None:
        """patience_s: how long to wait for them, at most; a few transfers' time. Who is not here then is waited for no more."""
        self._patience_s = patience_s
        self._missing: dict[Hashable, int] = {}
        self._changed = asyncio.Event()

    def expect(self, group: Hashable) -> None:
        """One is on its way, alone."""
        self._missing[group] = 1

    def arrive(self, group: Hashable, together: int = 1) -> None:
        """One has come, of a group of so many."""
        missing = self._missing.pop(group, together) - 1
        if missing > 0:
            self._missing[group] = missing
        self._changed.set()

    def forget(self, group: Hashable) -> None:
        """It will not come."""
        self._missing.pop(group, None)
        self._changed.set()

    async def complete(self) -> None:
        """Until all are here, or patience ends."""
        try:
            async with asyncio.timeout(self._patience_s):
                while self._missing:
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            self._missing.clear()
