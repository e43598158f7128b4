"""Settings of a context service."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class ContextConfig:
    """Built once by the CLI; every field has its final value."""

    checkpoint: Path
    redis_url: str
    revision: str | None = None
    """What tells the checkpoint from others of its shape, where it does not say so itself."""
    host: str = "127.0.0.1"
    port: int = 0
    """0: any free port."""
    advertise: str | None = None
    """Address that gateways and workers dial, where it differs from the one listened on."""
    dtype: str = "auto"
    """auto (the checkpoint's), float32 or bfloat16."""
    device: str = "auto"
    """auto (CUDA where there is one), cpu, cuda, cuda:N."""
    kernels: str = "auto"
    """What computes: auto (by device), torch, cpu, triton."""
    experts: str = "auto"
    """Precision of the routed experts: auto (as the checkpoint stores them), bf16 (the model's dtype), fp8, fp4."""
    threads: int = 1
    """CPU threads of torch."""
    turns: Path | None = None
    """File over which towers of one machine take turns on its CPU cores; None: no need."""
    max_sessions: int = 64
    """Sessions held at once, if their states fit `state_memory`; more of them wait."""
    state_memory: str = "auto"
    """For the states of sessions: auto, or a size such as 40G. Fewer sessions are held if it is short."""
    max_waiting: int = 256
    """Sessions that wait for state memory; one more is refused as overloaded."""
    transport: str = "auto"
    """How states reach workers: auto, grpc, shm or dist."""
    prefill_chunk: int = 128
    """Prompt tokens of a forward, and of a cached prefix's chunk."""
    prefill_budget: int = 512
    """Tokens of an iteration, so that a long prompt does not hold up commits."""
    prefix_memory: str = "auto"
    """For cached prefixes: auto (a quarter of what states may take), a size such as 8G, or 0 for none."""
    prefix_redis_memory: str = "1G"
    """For cached prefixes in Redis, of all replicas together: a size, or 0 for none."""
    metrics_port: int | None = None
    """Of Prometheus metrics over HTTP; 0: any free port, None: none."""
    trace: Path | None = None
    """Directory to record spans in."""
    stall_s: float = 30.0
    """A forward that has not returned for this long, and for far longer than any before, ends the process."""
    silence_s: float = 5.0
    """A worker that says nothing for this long loses its sessions."""
    drain_s: float = 30.0
    """How long running sessions may take after SIGTERM."""
