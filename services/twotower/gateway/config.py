"""Settings of a gateway."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class GatewayConfig:
    """Built once by the CLI; every field has its final value."""

    checkpoint: Path
    """Only its headers, config and tokenizer are read."""
    redis_url: str
    revision: str | None = None
    """What tells the checkpoint from others of its shape, where it does not say so itself."""
    host: str = "127.0.0.1"
    grpc_port: int = 0
    """0: any free port."""
    http_port: int = 0
    """0: any free port."""
    model_name: str | None = None
    """Name under which the model is served; None: the checkpoint directory's name."""
    context_experts: str = "auto"
    """Precision at which the contexts run their experts; part of the identity under which they are found."""
    max_in_flight: int = 256
    """Requests served at once; one more is refused as overloaded."""
    max_body_bytes: int | None = None
    """Largest HTTP request body; a larger one is refused as such. None: by what prompts can take (see `body_limits`)."""
    max_bodies_bytes: int | None = None
    """Bodies of all HTTP requests in flight together; one more is refused as overloaded. None: some of the largest."""
    cors_origins: tuple[str, ...] = ()
    """Origins whose web pages may call the HTTP face from a browser; "*": all."""
    drain_s: float = 30.0
    """How long running requests may take after SIGTERM."""
    reopen_wait_s: float = 15.0
    """How long a request whose context died waits for another one."""
    snapshot_keep_s: float = 60.0
    """How long the last known replicas are used while Redis does not answer."""

    @property
    def served_name(self) -> str:
        """Name under which the model is served."""
        return self.model_name or self.checkpoint.resolve().name
