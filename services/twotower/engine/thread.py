"""The one thread of a process that computes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")


class EngineThread:
    """Runs torch's work, one call after the other, beside the event loop.

    Every thread that calls a parallel operation gets a team of OpenMP threads of its own, and as soon as there are
    more of these in all than CPUs, none of them spins for work any more: each small operation then wakes
    its helpers through the kernel, which was seen to cost more than half of the speed. So loading, warming up and
    serving all run here, and the event loop's own thread keeps to one CPU.
    """

    def __init__(self, name: str, threads: int = 1) -> None:
        """threads: CPU threads of an operation."""
        torch.set_num_threads(1)  # of the calling thread,
        torch.get_num_threads()  # which takes the number that was set last when it first asks for it: now, and not later
        self._executor = ThreadPoolExecutor(1, name, initializer=torch.set_num_threads, initargs=(threads,))

    async def run(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """The result of `work`, which begins when all that came before it has ended."""
        return await asyncio.wrap_future(self._executor.submit(work, *args, **kwargs))

    async def settle(self) -> None:
        """Until what was begun has ended: what it computed with may then be given to others."""
        await self.run(_nothing)

    def close(self) -> None:
        """Begin nothing more."""
        self._executor.shutdown(wait=False, cancel_futures=True)


def _nothing() -> None:
    pass
