"""What the prefix cache counts, tier by tier. No torch here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(slots=True)
class TierStats:
    """One tier, since its process started."""

    hits: int = 0
    """Lookups that found a prefix."""
    misses: int = 0
    hit_tokens: int = 0
    """Tokens that need not be read again."""
    bytes: int = 0
    """Held now."""
    evictions: Counter[str] = field(default_factory=Counter)
    """Entries that made room for others, by segment."""
    failures: int = 0
    """Times the tier could not be used, or held what it should not."""

    @property
    def hit_ratio(self) -> float:
        """Hits among lookups; 0 before the first."""
        return self.hits / max(1, self.hits + self.misses)


@dataclass(frozen=True, slots=True)
class PrefixStats:
    """All tiers of one context replica, by name."""

    tiers: Mapping[str, TierStats]

    @classmethod
    def of(cls, *names: str) -> PrefixStats:
        """Tiers that have counted nothing yet."""
        return cls({name: TierStats() for name in names})
