"""Order of work in the context tower: commits first, then AR tokens, then prefill chunks within a token budget.

Pure: knows no torch, no time and no tasks. Items are the caller's own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")

MIN_PREFILL = 16
"""Prompt tokens an iteration reads even when commits and AR tokens fill its budget, so that none waits forever."""


@dataclass(slots=True)
class Plan(Generic[T]):
    """The work of one iteration."""

    commits: list[T] = field(default_factory=list)
    decodes: list[T] = field(default_factory=list)
    prefills: list[tuple[T, int]] = field(default_factory=list)
    """With the number of prompt tokens to read."""

    def __bool__(self) -> bool:
        return bool(self.commits or self.decodes or self.prefills)


class ContextScheduler(Generic[T]):
    """Collects work, and plans one iteration at a time.

    A worker waits for its commit and an AR client for its token, so all of these go into every iteration;
    prompts share what is left of the budget, in order of arrival.
    """

    def __init__(self, budget: int, tokens_of: Callable[[T], int]) -> None:
        """budget: tokens an iteration should process; tokens_of: how many an item still has."""
        self._budget = budget
        self._tokens_of = tokens_of
        self._commits: list[T] = []
        self._decodes: list[T] = []
        self._prefills: list[T] = []

    def add_commit(self, item: T) -> None:
        """A finished block to take into the state."""
        self._commits.append(item)

    def add_decode(self, item: T) -> None:
        """A session that wants its next AR token."""
        self._decodes.append(item)

    def add_prefill(self, item: T) -> None:
        """A prompt to read; it stays until `tokens_of` says that nothing is left."""
        self._prefills.append(item)

    @property
    def commits(self) -> int:
        """Blocks that wait."""
        return len(self._commits)

    def __bool__(self) -> bool:
        """Whether anything waits."""
        return self.urgent or any(map(self._tokens_of, self._prefills))

    @property
    def only_commits(self) -> bool:
        """Whether blocks wait, and nothing else does."""
        return bool(self._commits) and not self._decodes and not any(map(self._tokens_of, self._prefills))

    @property
    def urgent(self) -> bool:
        """Whether something waits that goes before prompts."""
        return bool(self._commits or self._decodes)

    def discard(self, item: T) -> None:
        """Forget an item, if it is here."""
        for queue in (self._commits, self._decodes, self._prefills):
            if item in queue:
                queue.remove(item)

    def plan(self) -> Plan[T]:
        """The next iteration. Commits and decodes leave the scheduler; prefills leave once they are read."""
        self._prefills = [item for item in self._prefills if self._tokens_of(item)]
        plan = Plan(self._commits, self._decodes)
        self._commits, self._decodes = [], []
        room = max(self._budget - sum(map(self._tokens_of, plan.commits)) - len(plan.decodes), MIN_PREFILL)
        for item in self._prefills:
            take = min(room, self._tokens_of(item))
            if take <= 0:
                break
            plan.prefills.append((item, take))
            room -= take
        return plan
