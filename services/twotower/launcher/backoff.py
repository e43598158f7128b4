"""How long a service that ended waits before it is started again. Pure: no clock, no processes."""

from __future__ import annotations

from dataclasses import dataclass

FIRST_S = 0.25
MAX_S = 30.0
STABLE_S = 5.0


@dataclass(slots=True)
class Backoff:
    """Doubling waits, bounded, and forgotten once the service has run for long enough.

    The first end costs no wait: most deaths are accidents, and clients are waiting.
    """

    first_s: float = FIRST_S
    max_s: float = MAX_S
    stable_s: float = STABLE_S
    """A service that was ready for this long is thought to be well again."""
    ends: int = 0
    """Ends in a row, none of them after a stable time."""

    def ended(self, ready_s: float) -> float:
        """Seconds to wait, now that the service has ended, `ready_s` seconds after it had become ready."""
        if ready_s >= self.stable_s:
            self.ends = 0
        self.ends += 1
        if self.ends == 1:
            return 0.0
        # The exponent is bounded too: a float to the power of thousands overflows.
        return min(self.max_s, self.first_s * 2.0 ** min(self.ends - 2, 60))
