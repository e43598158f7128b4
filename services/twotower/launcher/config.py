"""Settings of a stack on one machine."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

from twotower.errors import ConfigError

FEW_CORES = 4
"""A tower with fewer cores than these for itself is better off with all of them half of the time ..."""
MOST_CORES = 8
"""... unless they are so many that one operation does not keep all of them busy."""


def usable_cores() -> int:
    """CPUs that this process may use: in a container, often fewer than the machine has."""
    return len(os.sched_getaffinity(0))


@dataclass(frozen=True, slots=True)
class UpConfig:
    """Built once by the CLI; every field has its final value."""

    checkpoint: Path
    revision: str | None = None
    """What tells the checkpoint from others of its shape; None, where it does not say so itself: one of this stack's own."""
    contexts: int = 1
    denoisers: int = 1
    host: str = "127.0.0.1"
    grpc_port: int = 0
    """0: any free port."""
    http_port: int = 0
    """0: any free port."""
    redis_url: str | None = None
    """None: an embedded server, which lives and dies with the stack."""
    dtype: str = "auto"
    device: str = "auto"
    kernels: str = "auto"
    """What computes: auto (by device), torch, cpu, triton."""
    experts: str = "auto"
    """Precision of the denoisers' routed experts: auto (as the checkpoint stores them), bf16, fp8, fp4."""
    context_experts: str = "auto"
    """The same of the contexts'."""
    transport: str = "auto"
    """How states get from contexts to denoisers: auto, grpc, shm or dist."""
    threads: int | None = None
    """CPU threads of each tower; None: see `tower_threads`."""
    slots: int = 8
    """Sessions each denoiser refines together."""
    max_sessions: int = 64
    """Sessions each context holds."""
    state_memory: str = "auto"
    """Of each tower, for the states of its sessions."""
    prefix_memory: str = "auto"
    """Of each context, for cached prefixes."""
    prefix_redis_memory: str = "1G"
    """Of the contexts together, for cached prefixes in Redis."""
    trace: Path | None = None
    """Directory where the towers record spans."""
    drain_s: float = 30.0
    """How long running requests may take after SIGTERM."""
    unhealthy_after_s: float = 10.0
    """How long a service may not answer before it is killed and started again; 0: as long as it likes."""
    start_s: float = 600.0
    """How long a service may take to load its tower."""
    debug: bool = False
    """Services log in detail."""

    def __post_init__(self) -> None:
        for name, least in (("contexts", 1), ("denoisers", 1), ("slots", 1), ("max_sessions", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name}: must be at least {least}, not {getattr(self, name)}")
        if self.threads is not None and self.threads < 1:
            raise ConfigError(f"threads: must be at least 1, not {self.threads}")
        if not (self.drain_s >= 0 and math.isfinite(self.drain_s)):  # also refuses NaN
            raise ConfigError(f"drain: must be a finite number of seconds, not {self.drain_s}")
        if not (self.unhealthy_after_s >= 0 and math.isfinite(self.unhealthy_after_s)):
            raise ConfigError(f"unhealthy_after: must be a finite number of seconds, not {self.unhealthy_after_s}")
        if self.grpc_port == self.http_port != 0:
            raise ConfigError(f"http_port: {self.http_port} is the gRPC port; the two need one each")

    @property
    def tower_threads(self) -> int:
        """CPU threads of each tower: an equal share of the cores; where that would be few, all of them in turns."""
        cores, towers = usable_cores(), self.contexts + self.denoisers
        # More towers than cores keep these busy with a thread each.
        few = towers <= cores < FEW_CORES * towers and cores <= MOST_CORES
        return self.threads or (cores if few else max(1, cores // towers))

    @property
    def turns(self) -> bool:
        """Whether towers take turns on the cores, since each of them uses all."""
        return self.tower_threads >= usable_cores()
