"""Towers of one machine that take turns on its CPU cores.

With fewer cores than their threads, two towers that compute at a time wait for each other's threads inside every
operation. So each has all cores for the length of a turn: a step of the denoiser, or what waits for the context.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable
from pathlib import Path

from twotower.errors import ConfigError

POLL_S = 0.0002, 0.001
"""How long to wait before looking again: at first, and for a turn that lasts. Each look costs those who compute."""
PATIENCE_S = 3.0
"""The longest wait. Who holds on for longer is stuck, or very slow; going on beside it is right, and only slower. Nobody
waits again before the turn has been free once."""
_NEXT, _CORES = 0, 1


class Turns:
    """Whose turn it is, kept as record locks on two bytes of a file: the kernel takes back what a dead process held.

    The first byte is held by who is next: who gives its turn back and asks at once for another one comes behind one who
    waits. For one thread of a process at a time.
    """

    def __init__(
        self, path: Path | None, sleep: Callable[[float], None] = time.sleep, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """path: a file that all these towers name; None: the cores are this tower's alone. Raises ConfigError."""
        self._sleep, self._clock = sleep, clock
        self._held = False
        self._patience_s = PATIENCE_S
        try:
            self._file = None if path is None else os.open(path, os.O_RDWR)
        except OSError as error:
            raise ConfigError(f"turns: {path}: {error.strerror}") from None

    @property
    def shared(self) -> bool:
        """Whether there may be others."""
        return self._file is not None

    def take(self) -> None:
        """Wait for a turn, unless this process has one."""
        if self._file is None or self._held:
            return
        began = self._clock()
        for byte in (_NEXT, _CORES):
            while not (locked := self._lock(byte)) and (waited := self._clock() - began) < self._patience_s:
                self._sleep(min(max(POLL_S[0], waited / 20), POLL_S[1]))
        self._patience_s = PATIENCE_S if locked else 0.0
        self._unlock(_NEXT)
        self._held = True

    def give(self) -> None:
        """Let others have theirs."""
        if self._held:
            self._held = False
            self._unlock(_CORES)

    def close(self) -> None:
        """Leave the others to themselves."""
        if self._file is not None:
            os.close(self._file)  # with it go its locks
            self._file, self._held = None, False

    def _lock(self, byte: int) -> bool:
        assert self._file is not None
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, byte)
        except OSError:
            return False
        return True

    def _unlock(self, byte: int) -> None:
        assert self._file is not None
        fcntl.lockf(self._file, fcntl.LOCK_UN, 1, byte)
