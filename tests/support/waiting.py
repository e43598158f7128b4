"""Waiting for what another task or process does."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


async def until(condition: Callable[[], object], timeout_s: float = 20) -> None:
    """Return once `condition()` is true; fail with TimeoutError."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110  # the condition is of others' making
            await asyncio.sleep(0.01)
