"""How the towers of one machine share its cores. With cores to spare, or on a GPU, `Pacing` does nothing.

On few cores, two towers that compute at a time wait for each other's threads inside every operation, and batches fall
apart into small ones, each of which reads all experts. So there the towers take turns (`turns`): a turn is one step of the
denoiser, or what waits for the context.

- *Merging.* Where only a few blocks wait to be committed and denoisers are at many more, the context lets these be finished
  first, at most `MERGE_S`: sessions a few steps apart fall into step, and the batches of both towers stay full. Nothing is
  lost but the time of these few blocks, since the denoisers have the cores meanwhile.
- *Gathering.* Requests that come together are read together, and so are in step from the beginning: prompts wait until none
  has come for `GATHER_S`, at most four times as long. Where no two sessions have been here for `CROWD_S`, none waits.
- *Arrival.* A turn of the context ends when what it made has arrived at the denoisers, or after `ARRIVE_S`: else they would
  go on without those whose deltas are a millisecond behind. A session that is alone leaves none behind.
- *Credit.* After commits and prompts, which give denoisers more to do at a time, the context may go on with what has come
  since, but no longer than `CREDIT_S` at once, and in the long run no longer than the denoisers have had the cores.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from twotower.engine.turns import Turns

MERGE_S = 0.5
GATHER_S = 0.003
CROWD_S = 1.0
ARRIVE_S = 0.1
CREDIT_S = 1.0
POLL_S = 0.0002


@dataclass(frozen=True, slots=True)
class Load:
    """What waits for a tower."""

    commits: int = 0
    """Blocks to take into states."""
    prompts: int = 0
    """Sessions with prompts to read."""
    others: int = 0
    """Other sessions with something to compute."""
    elsewhere: int = 0
    """Sessions whose blocks denoisers write now: each will ask for a commit."""
    sessions: int = 0
    """All that are here."""

    @property
    def idle(self) -> bool:
        """Nothing waits."""
        return not self.commits and not self.prompts and not self.others


class Outbound:
    """What a tower has made, on its way to where it is needed. Counted by two threads, each in counters of its own."""

    def __init__(self) -> None:
        self.delivered = 0
        """Batches of results, counted by the loop as it delivers them,"""
        self.taken = 0
        """and by the event loop when it has taken them."""
        self.on_way = 0
        """Transfers that have not arrived; counted by the event loop."""

    @property
    def arrived(self) -> bool:
        """Whether nothing is on its way."""
        return self.taken == self.delivered and not self.on_way


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
    """The context's side: merging, arrival and credit."""

    def __init__(
        self,
        turns: Turns,
        outbound: Outbound,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        super().__init__(turns)
        self._outbound = outbound
        self._clock, self._sleep = clock, sleep
        self._merging: float | None = None
        """Since when a few blocks wait for more."""
        self._gathering: tuple[float, float, int] | None = None
        """Since when prompts wait for more, when the last came, and how many there are."""
        self._crowded = clock()
        """When there was last more than one session."""
        self._credit_s = CREDIT_S
        self._gave = float("-inf")
        self._began: float | None = None
        """When this turn began; None: others have theirs."""

    def patience(self, load: Load) -> float | None:
        """See `Pacing`, and merging above."""
        if load.sessions > 1:
            self._crowded = self._clock()
        if load.idle:
            self._merging = self._gathering = None
            self._give()
            return None
        if load.prompts and not load.commits and not load.others and self._began is None:
            return 0.0 if self._clock() >= self._crowded + CROWD_S else self._gather(load.prompts)
        if load.prompts or load.others or not self._few(load):
            self._merging = None
            return 0.0
        now = self._clock()
        self._merging = now if self._merging is None else self._merging
        left = self._merging + MERGE_S - now
        if left <= 0:
            return 0.0
        self._give()
        return left

    def _gather(self, prompts: int) -> float:
        now = self._clock()
        first, last, before = self._gathering or (now, now, 0)
        if prompts > before:
            last = now
        self._gathering = first, last, prompts
        return max(0.0, min(last + GATHER_S, first + 4 * GATHER_S) - now)

    @staticmethod
    def _few(load: Load) -> bool:
        """Few blocks wait, and denoisers are at many more."""
        return 2 * load.commits < load.elsewhere

    def begin(self) -> None:
        """Wait for a turn, unless this tower has it still."""
        self._merging = self._gathering = None
        if self._began is None:
            super().begin()
            self._began = self._clock()
            self._credit_s = min(CREDIT_S, self._credit_s + self._began - self._gave)

    def end(self, load: Load) -> None:
        """Keep the turn while there is credit and more to do of what fills the denoisers' batches."""
        assert self._began is not None
        few = not load.others and not load.prompts and self._few(load)
        if load.idle or few or self._clock() >= self._began + self._credit_s:
            give_up = self._clock() + (0.0 if load.sessions == 1 else ARRIVE_S)
            while not self._outbound.arrived and self._clock() < give_up:
                self._sleep(POLL_S)
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
