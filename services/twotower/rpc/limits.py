"""How many calls one gRPC port takes at once, and how long it waits for the message of a call that has begun."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

from twotower.errors import DeadlineExceeded, InvalidArgument, Overloaded

MESSAGE_S = 10.0
"""How long the first message of a call may take, from the call's beginning."""
YIELD_S = 0.5
"""A call that has waited this long for its message makes room for others when there are too many."""
MAX_BEGINNING = 64
"""The most calls that wait for their first message before the oldest makes room. This and the largest message bound the
memory that they take."""


class CallLimits:
    """The calls of one server."""

    def __init__(self, max_calls: int) -> None:
        self._max_calls = max_calls
        self.calls = 0
        self._beginning: dict[asyncio.Timeout, float] = {}  # the time each began, the oldest first

    @contextmanager
    def call(self) -> Iterator[None]:
        """Count one call for as long as the context lasts. Raises Overloaded."""
        if self.calls >= self._max_calls:
            raise Overloaded(f"{self.calls} calls are open, and {self._max_calls} is the most; try again")
        self.calls += 1
        try:
            yield
        finally:
            self.calls -= 1

    async def first_message(self, requests: AsyncIterator[Any]) -> Any:
        """The message with which a call begins. Raises InvalidArgument, DeadlineExceeded."""
        now = asyncio.get_running_loop().time()
        self._make_room(now)
        limit = asyncio.timeout(MESSAGE_S)
        try:
            async with limit:
                self._beginning[limit] = now
                message = await anext(requests, None)
        except TimeoutError:
            raise DeadlineExceeded("the message of the call came too slowly") from None
        finally:
            self._beginning.pop(limit, None)
        if message is None:
            raise InvalidArgument("message", "is missing")
        return message

    def _make_room(self, now: float) -> None:
        if len(self._beginning) < MAX_BEGINNING:
            return
        oldest = next(iter(self._beginning))
        if now - self._beginning[oldest] >= YIELD_S:  # otherwise many calls just began at once, which is normal
            del self._beginning[oldest]
            oldest.reschedule(now)
