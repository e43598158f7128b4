"""What goes wrong meanwhile. A strike runs until it is cancelled, and undoes then what can be undone."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from tests.support.processes import Up

Strike = Callable[[Up, "Say"], Coroutine[Any, Any, None]]
Say = Callable[[str], None]

TOWERS = ("denoiser", "denoiser", "context")
"""Kinds by chance: a denoiser twice as often as a context."""


def kill(kinds: Sequence[str] = TOWERS, every_s: float = 2.0, seed: int = 9) -> Strike:
    """kill -9 of a random process of a random kind, about every so many seconds."""

    async def strike(up: Up, say: Say) -> None:
        rng = random.Random(seed)
        while True:
            await asyncio.sleep(every_s * rng.uniform(0.5, 1.5))
            kind = rng.choice(kinds)
            if pids := await asyncio.to_thread(up.of_kind, kind):
                _signal(rng.choice(pids), signal.SIGKILL)
                say(f"kill -9 of a {kind}")

    return strike


def stop(kinds: Sequence[str] = TOWERS, for_s: float = 30.0, rest_s: float = 5.0, seed: int = 9) -> Strike:
    """SIGSTOP of a random process, and SIGCONT after a while, again and again."""

    async def strike(up: Up, say: Say) -> None:
        rng = random.Random(seed)
        while True:
            await asyncio.sleep(rest_s * rng.uniform(0.5, 1.5))
            kind = rng.choice(kinds)
            if pids := await asyncio.to_thread(up.of_kind, kind):
                pid = rng.choice(pids)
                _signal(pid, signal.SIGSTOP)
                say(f"a {kind} is stopped for {for_s:g} s")
                try:
                    await asyncio.sleep(for_s)
                finally:
                    _signal(pid, signal.SIGCONT)

    return strike


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
