"""How long a service that ended waits before it is started again. Pure: no clock, no processes."""

from __future__ import annotations

from dataclasses import dataclass

FIRST_S = 0.25
MAX_S = 30.0
STABLE_S = 5.0


@dataclass(slots=True)
class Backoff:
    """Doubling waits with a bound, which start over once the service has run for long enough.

    There is no wait after the first end, since most ends are accidents, and clients are waiting.
    """

    first_s: float = FIRST_S
    max_s: float = MAX_S
    stable_s: float = STABLE_S
    """A service that was ready for this long counts as healthy again."""
    ends: int = 0
    """Ends in a row without a stable time before any of them."""

    def ended(self, ready_s: float) -> float:
        """Record an end, `ready_s` seconds after the service had become ready; returns the seconds to wait."""
        if ready_s >= self.stable_s:
            self.ends = 0
        self.ends += 1
        if self.ends == 1:
            return 0.0
        # The exponent is bounded too, since a float to the power of thousands overflows.
        return min(self.max_s, self.first_s * 2.0 ** min(self.ends - 2, 60))
