"""The choice of a transport, and its limits."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class TransportKind(StrEnum):
    """The transports, by name."""

    GRPC = "grpc"
    SHM = "shm"
    DIST = "dist"


AUTO = "auto"
CHOICES = (AUTO, *(kind.value for kind in TransportKind))


@dataclass(frozen=True, slots=True)
class TransportConfig:
    """The transport settings of one process, a context or a worker."""

    kind: TransportKind | None = None
    """None: the best transport that both ends support."""
    shm_bytes: int = 1 << 30
    """The most shared memory that a context holds; transfers that do not fit go in frames."""
    timeout_s: float = 30.0
    """How long a peer of `dist` may take to join the group, or to move one state."""

    @classmethod
    def of(cls, choice: str) -> TransportConfig:
        """Returns the kind that one of `CHOICES` names."""
        return cls(None if choice == AUTO else TransportKind(choice))
