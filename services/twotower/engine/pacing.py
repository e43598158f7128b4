"""How the towers of one machine share its cores. With cores to spare, or on a GPU, `Pacing` does nothing.

On few cores, two towers that compute at a time wait for each other's threads inside every operation, and batches fall
apart into small ones, each of which reads all experts. So there the towers take turns (`turns`): a turn is one step of the
denoiser, or what waits for the context.

- *Merging.* Where only a few blocks wait to be committed and denoisers are at many more, the context lets these be finished
  first, at most `MERGE_S`: sessions a few steps apart fall into step, and the batches of both towers stay full. Nothing is
  lost but the time of these few blocks, since the denoisers have the cores meanwhile.
- *Credit.* After commits and prompts, which give denoisers more to do at a time, the context may go on with what has come
  since, but no longer than `CREDIT_S` at once, and in the long run no longer than the denoisers have had the cores.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from twotower.engine.turns import Turns

MERGE_S = 0.5
CREDIT_S = 1.0


@dataclass(frozen=True, slots=True)
class Load:
    """What waits for a tower."""

    commits: int = 0
    """Blocks to take into states."""
    others: int = 0
    """Other sessions with something to compute."""
    elsewhere: int = 0
    """Sessions whose blocks denoisers write now: each will ask for a commit."""

    @property
    def idle(self) -> bool:
        """Nothing waits."""
        return not self.commits and not self.others


class Pacing:
    """A tower with cores of its own: nothing waits, and whatever waits is run."""

    def patience(self, load: Load) -> float | None:
        """How long to wait for more to come before the next iteration: 0: not at all, None: until something comes."""
        return None if load.idle else 0.0

    def begin(self) -> None:
        """An iteration is about to compute."""

    def end(self, load: Load) -> None:
        """It is over; `load` waits for the next one."""

    def close(self) -> None:
        """The loop has ended."""


class SharedPacing(Pacing):
    """A tower that takes turns: one iteration each."""

    def __init__(self, turns: Turns) -> None:
        self._turns = turns

    def begin(self) -> None:
        """Wait for a turn."""
        self._turns.take()

    def end(self, load: Load) -> None:
        """Let others have theirs."""
        self._turns.give()

    def close(self) -> None:
        """Let others have theirs."""
        self._turns.give()


class ContextPacing(SharedPacing):
    """The context's side: merging and credit."""

    def __init__(self, turns: Turns, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(turns)
        self._clock = clock
        self._merging: float | None = None
        """Since when a few blocks wait for more."""
        self._credit_s = CREDIT_S
        self._gave = float("-inf")
        self._began: float | None = None
        """When this turn began; None: others have theirs."""

    def patience(self, load: Load) -> float | None:
        """See `Pacing`, and merging above."""
        if load.idle:
            self._give()
            return None
        if load.others or 2 * load.commits >= load.elsewhere:
            self._merging = None
            return 0.0
        now = self._clock()
        self._merging = now if self._merging is None else self._merging
        left = self._merging + MERGE_S - now
        if left <= 0:
            return 0.0
        self._give()
        return left

    def begin(self) -> None:
        """Wait for a turn, unless this tower has it still."""
        self._merging = None
        if self._began is None:
            super().begin()
            self._began = self._clock()
            self._credit_s = min(CREDIT_S, self._credit_s + self._began - self._gave)

    def end(self, load: Load) -> None:
        """Keep the turn while there is credit and more to do of what fills the denoisers' batches."""
        assert self._began is not None
        few = not load.others and 2 * load.commits < load.elsewhere
        if load.idle or few or self._clock() >= self._began + self._credit_s:
            self._give()

    def close(self) -> None:
        """See `Pacing`."""
        self._give()

    def _give(self) -> None:
        if self._began is not None:
            self._gave = self._clock()
            self._credit_s -= self._gave - self._began
            self._began = None
            super().close()
