"""The one thread of a process that computes."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

import torch

from twotower_kernels.cpu.team import pin

log = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

HELPERS = 4
"""Threads beside the event loop, for copies."""
SWITCH_S = 0.0005
"""How long the event loop may keep the interpreter from the engine's thread, which asks for it between any two operations."""


class EngineThread:
    """Runs torch's work, one call after the other, beside the event loop.

    Every thread that calls a parallel operation gets a team of OpenMP threads of its own, and as soon as there are
    more of these in all than CPUs, none of them spins for work any more: each small operation then wakes
    its helpers through the kernel, which was seen to cost more than half of the speed. So loading, warming up and
    serving all run here, and the event loop's own thread and its helpers keep to one CPU each.
    """

    def __init__(self, name: str, threads: int = 1, *, pinned: bool = False) -> None:
        """threads: CPU threads of an operation; pinned: each kept to a CPU of its own, which towers that take turns share.

        To be made in the event loop's thread.
        """
        _use_threads(1)
        sys.setswitchinterval(SWITCH_S)
        helpers = ThreadPoolExecutor(HELPERS, "helper", initializer=_use_threads, initargs=(1,))
        asyncio.get_running_loop().set_default_executor(helpers)  # of `asyncio.to_thread`, where states are packed
        self._executor = ThreadPoolExecutor(1, name, initializer=_use_threads, initargs=(threads, pinned))

    async def run(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """The result of `work`, which begins when all that came before it has ended."""
        return await asyncio.wrap_future(self._executor.submit(work, *args, **kwargs))

    def close(self) -> None:
        """Begin nothing more."""
        self._executor.shutdown(wait=False, cancel_futures=True)


def _use_threads(count: int, pinned: bool = False) -> None:
    """CPU threads of this thread's operations."""
    torch.set_num_threads(count)
    torch.get_num_threads()  # a thread takes the number that was set last, by any, when it first asks: now, and not later
    if pinned and not pin(count):
        log.debug("threads are not kept to CPUs of their own")
