"""Settings of a gateway."""

from __future__ import annotations

from dataclasses import dataclass

from twotower.errors import ConfigError
from twotower.gateway.scaling import Bounds, Policy
from twotower.service.config import ServiceConfig, context_experts
from twotower.settings.declare import part, setting
from twotower.settings.values import check


@dataclass(frozen=True, slots=True)
class GatewayConfig:
    """Made once, at the edge; every field has its final value.

    Of the checkpoint, only the headers, the config and the tokenizer are read.
    """

    service: ServiceConfig = part(ServiceConfig)
    grpc_port: int = setting(50051, least=0, most=65535, metavar="P", help="port of gRPC; 0: any free one")
    http_port: int = setting(8000, least=0, most=65535, metavar="P", help="port of HTTP; 0: any free one")
    model_name: str | None = setting(
        None, metavar="NAME", help="name under which the model is served", otherwise="the checkpoint directory's"
    )
    context_experts: str = context_experts("auto", "auto, as the checkpoint stores them")
    max_in_flight: int = setting(
        256, least=1, metavar="N", help="requests that are served at once; one more is refused as overload"
    )
    max_body_bytes: int | None = setting(
        None,
        unit="bytes",
        least=1,
        metavar="SIZE",
        help="largest body of an HTTP request",
        otherwise="1M to 8M, by the checkpoint's context",
    )
    max_bodies_bytes: int | None = setting(
        None,
        unit="bytes",
        least=1,
        metavar="SIZE",
        help="bodies of all HTTP requests together; one more is refused as overload",
        otherwise="eight of the largest",
    )
    cors_origins: tuple[str, ...] = setting(
        (),
        metavar="ORIGIN",
        help="origins whose web pages may call the HTTP face from a browser, such as https://example.org; *: all",
        otherwise="none",
    )
    reopen_wait_s: float = setting(
        15.0,
        unit="s",
        metavar="S",
        help="seconds that a request waits for a context or a denoiser while none is live: a first one starts, or one died",
    )
    ar_fallback: bool = setting(
        False, help="serve diffusion requests in mode ar while no denoiser is live, instead of holding them; the reply says so"
    )
    linger_s: float = setting(
        0.0,
        unit="s",
        metavar="S",
        help="seconds after SIGTERM for which a gateway still takes requests, until whoever balances load has noticed that it "
        "is not ready",
    )
    min_denoisers: int = setting(
        1,
        least=0,
        metavar="N",
        help="fewest denoisers that are wanted; 0: none while nobody asks, and requests wait for the first",
    )
    max_denoisers: int = setting(16, least=1, metavar="N", help="most denoisers that are wanted")
    min_contexts: int = setting(
        1,
        least=0,
        metavar="N",
        help="fewest contexts that are wanted; 0: none while nobody asks, and requests wait for the first",
    )
    max_contexts: int = setting(4, least=1, metavar="N", help="most contexts that are wanted")
    scale_goal_s: float = setting(
        2.0, unit="s", metavar="S", help="seconds that a session may wait for a slot before more replicas are wanted"
    )
    scale_fill: float = setting(
        0.8, least=0.05, most=1, metavar="X", help="share of the replicas' slots that is planned with; the rest is for bursts"
    )
    scale_up_every_s: float = setting(
        15.0, unit="s", metavar="S", help="seconds between two raises of how many are wanted: time for a replica to start"
    )
    scale_down_after_s: float = setting(
        120.0, unit="s", metavar="S", help="seconds for which fewer replicas must have been enough before fewer are wanted"
    )
    snapshot_keep_s: float = setting(
        60.0, unit="s", metavar="S", help="seconds for which the last known replicas count while Redis does not answer"
    )

    def __post_init__(self) -> None:
        check(self)
        for least, most in (("min_denoisers", "max_denoisers"), ("min_contexts", "max_contexts")):
            if getattr(self, least) > getattr(self, most):
                raise ConfigError(f"{least}: {getattr(self, least)} is more than {most}, {getattr(self, most)}")

    @property
    def scaling(self) -> Policy:
        """How many replicas are wanted when."""
        return Policy(
            denoisers=Bounds(self.min_denoisers, self.max_denoisers),
            contexts=Bounds(self.min_contexts, self.max_contexts),
            goal_s=self.scale_goal_s,
            fill=self.scale_fill,
            up_every_s=self.scale_up_every_s,
            down_after_s=self.scale_down_after_s,
        )

    @property
    def served_name(self) -> str:
        """Name under which the model is served."""
        return self.model_name or self.service.checkpoint.resolve().name
