"""Who may start: a bounded queue in front of a pool of states, by priority, then by arrival."""

from __future__ import annotations

import asyncio
import heapq
import itertools
from dataclasses import dataclass, field

from twotower.errors import InvalidArgument, Overloaded
from twotower.model.pool import PAGE, StatePool
from twotower.model.state import ContextState
from twotower.request import Priority


@dataclass(order=True, slots=True)
class _Waiting:
    """One in the queue; the smallest is next."""

    rank: int
    arrival: int
    tokens: int = field(compare=False)
    granted: asyncio.Future[ContextState] = field(compare=False)


class Admission:
    """Hands out states of a pool. What comes first and does not fit holds up what comes later, so that none starves."""

    def __init__(self, pool: StatePool, max_waiting: int) -> None:
        self.pool = pool
        self._max_waiting = max_waiting
        self._queue: list[_Waiting] = []
        self._arrivals = itertools.count()

    @property
    def waiting(self) -> int:
        """Sessions in the queue."""
        return len(self._queue)

    def check(self, tokens: int) -> None:
        """Raise InvalidArgument if no wait would help, Overloaded if the queue is full."""
        if not self.pool.ever_fits(tokens):
            most = self.pool.size.pages * PAGE
            raise InvalidArgument("max_tokens", f"prompt and completion take {tokens} tokens of state memory, of {most} in all")
        if not self._fits_now(tokens) and len(self._queue) >= self._max_waiting:
            raise Overloaded(f"all state memory is taken, and {len(self._queue)} sessions wait for it already")

    async def acquire(self, tokens: int, priority: Priority = Priority.NORMAL) -> ContextState:
        """A state with room for `tokens`, once there is one. Raises InvalidArgument, Overloaded."""
        self.check(tokens)
        if self._fits_now(tokens):
            return self.pool.acquire(tokens)
        waiting = _Waiting(-priority, next(self._arrivals), tokens, asyncio.get_running_loop().create_future())
        heapq.heappush(self._queue, waiting)
        try:
            return await waiting.granted
        except asyncio.CancelledError:
            if not waiting.granted.cancelled():  # granted in the moment of leaving
                self.pool.release(waiting.granted.result())
            self._grant()
            raise

    def release(self, state: ContextState) -> None:
        """Give a state back; nothing may compute with it any more."""
        self.pool.release(state)
        self._grant()

    def _fits_now(self, tokens: int) -> bool:
        return not self._queue and self.pool.fits(tokens)

    def _grant(self) -> None:
        """Serve the queue as far as there is room, and forget those who left it."""
        self._queue = [waiting for waiting in self._queue if not waiting.granted.cancelled()]
        heapq.heapify(self._queue)
        while self._queue and self.pool.fits(self._queue[0].tokens):
            waiting = heapq.heappop(self._queue)
            waiting.granted.set_result(self.pool.acquire(waiting.tokens))
