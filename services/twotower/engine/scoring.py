"""Log probabilities of prompts: the context tower reads tokens that are given, and says how likely each was where it stands."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from twotower.engine.logprobs import token_logprobs
from twotower.errors import NonFiniteLogits, TwoTowerError, Unavailable
from twotower.model.context_tower import ContextTower
from twotower.model.state import ContextState
from twotower.request import TokenLogprob

log = logging.getLogger(__name__)

ROWS = 64
"""Positions whose logits are held at a time: 32 MB of them, with 131,072 tokens, and what is made of them is as much again."""

Tell = Callable[[Sequence[TokenLogprob] | TwoTowerError], object]


class Scoring:
    """A prompt on its way through the tower."""

    def __init__(self, name: str, tokens: Sequence[int], top: int, state: ContextState, tell: Tell) -> None:
        """`top`: likeliest tokens to name at each place. `state`: an empty one, with room for all tokens.

        `tell` takes logprobs of the tokens but the first, in their order and in pieces, or why there are no more.
        """
        self.name = name
        self.tokens = list(tokens)
        self.top = top
        self.state = state
        self.alone = False
        """It shares no forward, since one that it was in has failed."""
        self._tell = tell
        self._told = 0

    @property
    def left(self) -> int:
        """Tokens to read."""
        return len(self.tokens) - self.state.length

    def targets(self, start: int, end: int) -> list[int]:
        """The tokens that the positions start to end, which have been read, should say: the last position has none."""
        return self.tokens[start + 1 : end + 1]

    def tell(self, first: int, logprobs: Sequence[TokenLogprob]) -> None:
        """Pass on the logprobs of the tokens from the `first` on, but for those that were told before it began again."""
        new = logprobs[max(0, self._told - (first - 1)) :]
        if new:
            self._told += len(new)
            self._tell(new)

    def fail(self, error: TwoTowerError) -> None:
        """Say that there is no more."""
        self._tell(error)


class PromptScorer:
    """All prompts that are being scored; `step` is one forward over some of them."""

    def __init__(self, tower: ContextTower, *, chunk: int, budget: int) -> None:
        """`chunk`: tokens of one prompt in a forward; `budget`: tokens of all, after which no prompt is added."""
        self._tower = tower
        self._chunk = chunk
        self._budget = budget
        self._scorings: dict[str, Scoring] = {}

    def __len__(self) -> int:
        return len(self._scorings)

    def begin(self, scoring: Scoring) -> None:
        """Take one more."""
        self._scorings[scoring.name] = scoring

    def leave(self, name: str) -> ContextState | None:
        """Nobody waits for it any more: returns its state, which is free; None where it is not here."""
        scoring = self._scorings.pop(name, None)
        return None if scoring is None else scoring.state

    def step(self) -> list[ContextState]:
        """Read the next tokens of some prompts; returns the states of those that are over, which are free."""
        work = self._plan()
        if not work:
            return []
        try:
            self._read(work)
        except Exception as error:
            if len(work) == 1:
                ((scoring, _),) = work
                log.error("reading prompt %s alone failed", scoring.name, exc_info=error)
                scoring.fail(
                    error if isinstance(error, TwoTowerError) else Unavailable("the context tower failed on this prompt")
                )
                return [self._over(scoring)]
            log.warning("a forward over %d prompts failed; each begins again, alone: %s", len(work), error)
            for scoring, _ in work:
                scoring.alone = True
                scoring.state.length = 0
            return []
        return [self._over(scoring) for scoring, _ in work if not scoring.left]

    def _plan(self) -> list[tuple[Scoring, int]]:
        work: list[tuple[Scoring, int]] = []
        room = self._budget
        for scoring in self._scorings.values():
            if work and (room <= 0 or scoring.alone):
                continue
            tokens = min(self._chunk, scoring.left)
            work.append((scoring, tokens))
            room -= tokens
            if scoring.alone:
                break
        return work

    @torch.inference_mode()
    def _read(self, work: Sequence[tuple[Scoring, int]]) -> None:
        device = self._tower.device
        starts = [scoring.state.length for scoring, _ in work]
        chunks = [
            torch.tensor(scoring.tokens[start : start + count], dtype=torch.int64, device=device)
            for (scoring, count), start in zip(work, starts, strict=True)
        ]
        h = self._tower.read(chunks, [scoring.state for scoring, _ in work])
        row = 0
        found: list[list[TokenLogprob]] = []
        for (scoring, count), start in zip(work, starts, strict=True):
            targets = torch.tensor(scoring.targets(start, start + count), dtype=torch.int64, device=device)
            found.append(self._logprobs(h[row : row + len(targets)], targets, scoring.top))
            row += count
        for (scoring, _), start, logprobs in zip(work, starts, found, strict=True):  # once nothing can fail any more
            scoring.tell(start + 1, logprobs)

    def _logprobs(self, h: Tensor, targets: Tensor, top: int) -> list[TokenLogprob]:
        logprobs: list[TokenLogprob] = []
        for at in range(0, len(targets), ROWS):
            logits = self._tower.logits(h[at : at + ROWS].unsqueeze(1))
            if not logits.isfinite().all():
                raise NonFiniteLogits("the context tower's logits are not finite")
            logprobs += token_logprobs(logits, targets[at : at + ROWS], top)
        return logprobs

    def _over(self, scoring: Scoring) -> ContextState:
        del self._scorings[scoring.name]
        return scoring.state
