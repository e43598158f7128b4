"""Settings of an evaluation."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from twotower.errors import ConfigError
from twotower.request import GenerationParams

AR_EVERY = 3
"""In a sweep, AR runs before every `AR_EVERY` parts of the problems, since on noisy machines a ratio needs close neighbours."""

TURN_PROBLEMS = 25
"""Problems after which the other mode has its turn, so that both modes see the same state of a noisy machine."""

SUITE = ("math", "code", "knowledge")
"""The families of the suite."""


def families() -> tuple[str, ...]:
    """The names of all families."""
    return ("stories", *SUITE)


@dataclass(frozen=True, slots=True)
class EvalConfig:
    """The settings of an evaluation, built once by the CLI; every field has its final value."""

    checkpoint: Path
    seed: int = 1
    """The seed of the problems, none of which can occur in training, whatever the seed."""
    problems: int = 200
    family: str = "stories"
    """The family of the problems: one of `families`."""
    batches: tuple[int, ...] = (1,)
    """Requests in flight; the first is the main result, and the others are reported beside it."""
    params: GenerationParams = field(default_factory=GenerationParams)
    """Parameters of the diffusion mode; AR uses those that apply to it."""
    dtype: str = "auto"
    device: str = "auto"
    kernels: str = "auto"
    experts: str = "auto"
    """Precision of the routed experts: auto (as the checkpoint stores them), bf16, fp8, fp4."""
    context_experts: str | None = None
    """Precision of the context's experts, if it differs."""
    threads: int | None = None
    """CPU threads; None: the fastest number, measured for each mode."""
    compiled: bool | None = None
    """Compiled graphs for single requests; None: the faster choice, measured for each mode."""

    def __post_init__(self) -> None:
        if self.family not in families():
            raise ConfigError(f"family: must be one of {', '.join(families())}, not {self.family!r}")
        for name in ("problems", "threads"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"{name}: must be at least 1, not {value}")
        if not self.batches or min(self.batches) < 1:
            raise ConfigError(f"batch: must be at least 1, not {min(self.batches, default='none')}")
