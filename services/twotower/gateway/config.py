"""Settings of a gateway."""

from __future__ import annotations

from dataclasses import dataclass

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
        15.0, unit="s", metavar="S", help="seconds that a request whose context died waits for another one"
    )
    snapshot_keep_s: float = setting(
        60.0, unit="s", metavar="S", help="seconds for which the last known replicas count while Redis does not answer"
    )

    def __post_init__(self) -> None:
        check(self)

    @property
    def served_name(self) -> str:
        """Name under which the model is served."""
        return self.model_name or self.service.checkpoint.resolve().name
