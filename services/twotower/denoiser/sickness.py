"""What makes a denoiser sick while it looks healthy: it answers, quickly even, and what it writes is worthless. Pure."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

BLOCKS = 64
"""Blocks that are looked at together."""
NEAR_ONE = 1.1
"""Tokens a forward, up to which the denoiser is as unsure as one that does not see its context."""
MOST_GAMMA = 0.9
"""Blocks whose threshold is higher take a forward a token by their own request, and say nothing."""
REPEATING = 0.5
"""Share of blocks that equal the block before them in their session."""
OUT_OF_STEPS = 0.95
"""Share of blocks whose last positions were committed because the steps had ended."""
NOT_FINITE_S = 60.0
"""How long logits that were not finite are held against a denoiser."""


@dataclass(frozen=True, slots=True)
class FinishedBlock:
    """What is looked at of a finished block."""

    tokens: int
    forwards: int
    steps: int
    gamma: float
    repeats: bool
    """It equals the block before it."""
    draft: bool = False
    """It is only a draft, in as few forwards as pay off."""

    @property
    def telling(self) -> bool:
        """Whether a healthy denoiser would take fewer forwards than tokens for it, where steps allow that."""
        return not self.draft and self.tokens >= 4 and self.gamma <= MOST_GAMMA

    @property
    def out_of_steps(self) -> bool:
        """Whether it took every forward that it was allowed."""
        return self.forwards >= self.steps


class Sickness:
    """Looks at the last blocks."""

    def __init__(self, blocks: int = BLOCKS) -> None:
        self._blocks: deque[FinishedBlock] = deque(maxlen=blocks)
        self._telling: deque[FinishedBlock] = deque(maxlen=blocks)
        self._not_finite_at = -NOT_FINITE_S

    def add(self, block: FinishedBlock) -> None:
        """One more block."""
        self._blocks.append(block)
        if block.telling:
            self._telling.append(block)

    def not_finite(self, now: float) -> None:
        """A session's logits were not finite, at `now` in seconds."""
        self._not_finite_at = now

    def signs(self, now: float) -> dict[str, bool]:
        """Each sign of sickness, and whether it shows."""
        telling = tuple(self._telling) if len(self._telling) == self._telling.maxlen else ()  # a scrape is in another thread
        forwards, tokens = sum(b.forwards for b in telling), sum(b.tokens for b in telling)
        whole = tuple(self._blocks) if len(self._blocks) == self._blocks.maxlen else ()
        return {
            "tokens_per_forward": bool(forwards) and tokens / forwards <= NEAR_ONE,
            "not_finite": now - self._not_finite_at < NOT_FINITE_S,
            "repeats": bool(whole) and sum(b.repeats for b in whole) / len(whole) >= REPEATING,
            "out_of_steps": bool(telling) and sum(b.out_of_steps for b in telling) / len(telling) >= OUT_OF_STEPS,
        }

    def why(self, now: float) -> str:
        """The signs that show, as announced; empty: none."""
        return ", ".join(sign for sign, shows in self.signs(now).items() if shows)
