"""Which transport, and within what limits."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class TransportKind(StrEnum):
    """A transport."""

    GRPC = "grpc"
    SHM = "shm"
    DIST = "dist"


AUTO = "auto"
CHOICES = (AUTO, *(kind.value for kind in TransportKind))


@dataclass(frozen=True, slots=True)
class TransportConfig:
    """Of one process: a context's or a worker's."""

    kind: TransportKind | None = None
    """None: the best that both ends can use."""
    shm_bytes: int = 1 << 30
    """Most shared memory that a context holds; what does not fit goes in frames."""
    timeout_s: float = 30.0
    """How long a peer of `dist` may take to meet, or to move one state."""

    @classmethod
    def of(cls, choice: str) -> TransportConfig:
        """From one of `CHOICES`."""
        return cls(None if choice == AUTO else TransportKind(choice))
