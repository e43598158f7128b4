"""Settings of an evaluation."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from twotower.errors import ConfigError
from twotower.request import GenerationParams

AR_EVERY = 3
"""In a sweep AR runs before every so many parts of the problems: machines are noisy, and a ratio needs a neighbour."""

AMONG = 25
"""Problems after which the other mode has its turn: both modes see the same state of a noisy machine."""

SUITE = ("math", "code", "knowledge")
"""The families of the suite."""


def families() -> tuple[str, ...]:
    """All there are."""
    return ("stories", *SUITE)


@dataclass(frozen=True, slots=True)
class EvalConfig:
    """Built once by the CLI; every field has its final value."""

    checkpoint: Path
    seed: int = 1
    """Of the problems; none of them can occur in training, whatever the seed."""
    problems: int = 200
    family: str = "stories"
    """Of the problems: one of `families`."""
    batches: tuple[int, ...] = (1,)
    """Requests in flight; the first is the headline, the others are reported beside it."""
    params: GenerationParams = field(default_factory=GenerationParams)
    """Of the diffusion mode; AR takes what applies to it."""
    dtype: str = "auto"
    device: str = "auto"
    kernels: str = "auto"
    experts: str = "auto"
    """Precision of the routed experts: auto (as the checkpoint stores them), bf16, fp8, fp4."""
    context_experts: str | None = None
    """Of the context's, where they differ."""
    threads: int | None = None
    """CPU threads; None: whatever is fastest, found out for each mode."""
    compiled: bool | None = None
    """Compiled graphs for single requests; None: whatever is faster, found out for each mode."""

    def __post_init__(self) -> None:
        if self.family not in families():
            raise ConfigError(f"family: must be one of {', '.join(families())}, not {self.family!r}")
        for name in ("problems", "threads"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"{name}: must be at least 1, not {value}")
        if not self.batches or min(self.batches) < 1:
            raise ConfigError(f"batch: must be at least 1, not {min(self.batches, default='none')}")
