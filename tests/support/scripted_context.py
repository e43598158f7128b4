"""A context service without a model that gives the tokens it is told, and keeps what it was asked."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import Any

from twotower.bench.simulated_context import FORWARDS, SimulatedContext, at_once
from twotower.internal.v1 import context_pb2

__all__ = ["FORWARDS", "ScriptedContext", "at_once"]


class ScriptedContext(SimulatedContext):
    """Gives the tokens of `script`, whatever the prompt."""

    def __init__(self, script: Sequence[int], before: Callable[[int], Awaitable[None]] = at_once) -> None:
        super().__init__(before)
        self.script = list(script)
        self.opened: list[context_pb2.OpenRequest] = []
        self.left = asyncio.Event()
        """A call was ended by its client."""

    def tokens_of(self, request: context_pb2.OpenRequest) -> Sequence[int]:
        return self.script

    async def Open(self, request: context_pb2.OpenRequest, context: Any) -> AsyncIterator[context_pb2.SessionEvent]:
        self.opened.append(request)
        try:
            opened: Any = super().Open(request, context)
            async with aclosing(opened) as events:
                async for event in events:
                    yield event
        except (asyncio.CancelledError, GeneratorExit):
            self.left.set()
            raise
