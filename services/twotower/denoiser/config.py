"""Settings of a denoiser worker."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class DenoiserConfig:
    """Built once by the CLI; every field has its final value."""

    checkpoint: Path
    redis_url: str
    revision: str | None = None
    """What tells the checkpoint from others of its shape, where it does not say so itself."""
    host: str = "127.0.0.1"
    port: int = 0
    """0: any free port; health and reflection are served there."""
    dtype: str = "auto"
    """auto (the checkpoint's), float32 or bfloat16."""
    device: str = "auto"
    """auto (CUDA where there is one), cpu, cuda, cuda:N."""
    kernels: str = "auto"
    """What computes: auto (by device), torch, cpu, triton."""
    experts: str = "auto"
    """Precision of the routed experts: auto (as the checkpoint stores them), bf16 (the model's dtype), fp8, fp4."""
    context_experts: str = "auto"
    """Precision at which the contexts run theirs; part of the identity under which processes find each other."""
    threads: int = 1
    """CPU threads of torch."""
    turns: Path | None = None
    """File over which towers of one machine take turns on its CPU cores; None: no need."""
    state_memory: str = "auto"
    """For the states of sessions: auto, or a size such as 40G. There are fewer slots if it is short."""
    slots: int = 8
    """Sessions refined together."""
    trace: Path | None = None
    """Directory to record spans in."""
    transport: str = "auto"
    """How states come from contexts: auto, grpc, shm or dist."""
    stall_s: float = 30.0
    """A forward that has not returned for this long, and for far longer than any before, ends the process."""
    drain_s: float = 30.0
    """How long running sessions may take after SIGTERM."""
