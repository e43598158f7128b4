"""How much a draft may cost, by what drafts earn: forwards of the denoiser a round, or AR's own steps. Pure.

It decides about speed alone: whatever it chooses, the text is AR's.
"""

from __future__ import annotations

from dataclasses import dataclass

CHOICES = (1, 2, 4)
"""Forwards that a draft may take."""
GUESS = 6.0
"""Tokens that a round of one forward is expected to keep, before any has."""
WEIGHT = 0.4
"""Of the last round in what is expected of the next one."""
TRY_EVERY = 16
"""Rounds after which the next larger effort is tried again, where it could earn more."""
REST = 64
"""AR steps after which drafts are tried again; doubled each time that they still earn less."""
MAX_REST = 512
"""The most AR steps between two tries."""


@dataclass(slots=True)
class Times:
    """What things take, in seconds: running means of what was measured. 0: nothing was."""

    token: float = 0.0
    """An AR step."""
    commit: float = 0.0
    """The verification of a draft."""
    step: float = 0.0
    """A forward of the denoiser."""
    kept: float = GUESS
    """Not a time: tokens that rounds of one forward kept, over all sessions. New ones expect no more."""

    @property
    def lost(self) -> bool:
        """Whether drafts earn less than AR steps, over all sessions."""
        return self.earn_less(self.kept, CHOICES[0])

    def earn_less(self, kept: float, steps: int) -> bool:
        """Whether drafts of `steps` forwards that keep `kept` tokens earn less than AR steps do."""
        token = self.token or self.commit  # until one is measured: it reads no more than a verification does
        return kept * token < self.round(steps)

    def measured(self, name: str, seconds: float) -> None:
        """Take one more measurement."""
        before = getattr(self, name)
        # A measurement far above the mean has another cause, such as a compilation or a neighbour's prompt.
        setattr(self, name, seconds if not before else before + 0.1 * (min(seconds, 4 * before) - before))

    def round(self, steps: int) -> float:
        """A round whose draft takes `steps` forwards."""
        return steps * self.step + self.commit


class Effort:
    """How much a draft of one session may cost."""

    def __init__(self, block_size: int, fixed: int = 0, times: Times | None = None) -> None:
        """fixed: forwards for every draft, as the request says; 0: chosen here. times: what other sessions have measured."""
        self._fixed = fixed
        self._block_size = block_size
        self._kept: dict[int, float] = {CHOICES[0]: min(times.kept if times else GUESS, GUESS, block_size)}
        """By forwards, the tokens that a round keeps."""
        self._choice = CHOICES[0]
        self._rounds = 0
        """Since the choice was made."""
        self._resting = 0
        """AR steps that are left before drafts are tried again."""
        self._rest = REST
        if times is not None and not fixed and times.lost:
            self._resting = REST
            times.kept += 0.02 * (GUESS - times.kept)  # so that some session tries again

    def choose(self) -> int:
        """Forwards for the next draft; 0: the next token is better written by an AR step."""
        if self._fixed:
            return self._fixed
        return 0 if self._resting else self._choice

    @property
    def resting(self) -> bool:
        """Whether AR's steps earn more for now."""
        return self._resting > 0

    def give_up(self) -> None:
        """Drafts are of no use to this session: AR's steps write the rest."""
        self._fixed, self._resting = 0, 1 << 62

    def rest(self) -> None:
        """Let AR's steps write for a while."""
        self._resting = max(self._resting, self._rest)

    def stepped(self) -> None:
        """An AR step has written a token."""
        self._resting = max(0, self._resting - 1)

    def verified(self, kept: int, times: Times) -> None:
        """A draft of the chosen effort has earned `kept` tokens."""
        if self._fixed:
            return
        if self._choice == CHOICES[0]:
            times.kept += 0.05 * (kept - times.kept)
        before = self._kept.get(self._choice, float(kept))
        self._kept[self._choice] = before + WEIGHT * (kept - before)
        self._rounds += 1
        best = max(self._kept, key=lambda steps: self._kept[steps] / (times.round(steps) or 1.0))
        if times.earn_less(self._kept[best], best):
            self._resting, self._rest = self._rest, min(2 * self._rest, MAX_REST)
            self._choose(CHOICES[0])
            return
        if self._resting == 0 and kept > 1:
            self._rest = REST
        larger = next((steps for steps in CHOICES if steps > best), None)
        if (
            self._choice == best
            and larger is not None
            and self._rounds >= TRY_EVERY
            and self._could_earn_more(larger, best, times)
        ):
            best = larger
        self._choose(best)

    def _could_earn_more(self, steps: int, than: int, times: Times) -> bool:
        """Whether a perfect draft of `steps` forwards would earn more than one of `than` forwards does."""
        return self._block_size * times.round(than) > self._kept[than] * times.round(steps)

    def _choose(self, steps: int) -> None:
        if steps != self._choice:
            self._choice, self._rounds = steps, 0
