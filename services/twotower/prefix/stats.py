"""The prefix cache's statistics, tier by tier. No torch here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(slots=True)
class TierStats:
    """The counts of one tier since its process started."""

    hits: int = 0
    """Lookups that found a prefix."""
    misses: int = 0
    hit_tokens: int = 0
    """Tokens that were not read again."""
    bytes: int = 0
    """Bytes held now."""
    evictions: Counter[str] = field(default_factory=Counter)
    """Evicted entries, by segment."""
    failures: int = 0
    """Times the tier could not be used, or held data that does not fit."""

    @property
    def hit_ratio(self) -> float:
        """Hits among lookups; 0 before the first."""
        return self.hits / max(1, self.hits + self.misses)


@dataclass(frozen=True, slots=True)
class PrefixStats:
    """The counts of all tiers of one context replica, by name."""

    tiers: Mapping[str, TierStats]

    @classmethod
    def of(cls, *names: str) -> PrefixStats:
        """Tiers of these names, with all counts at 0."""
        return cls({name: TierStats() for name in names})
