"""Settings of a context service."""

from __future__ import annotations

from dataclasses import dataclass

from twotower.service.config import ServiceConfig, TowerConfig
from twotower.settings.declare import part, setting
from twotower.settings.values import check


@dataclass(frozen=True, slots=True)
class ContextConfig:
    """Made once, at the edge; every field has its final value."""

    service: ServiceConfig = part(ServiceConfig)
    port: int = setting(0, least=0, most=65535, metavar="P", help="port of gRPC; 0: any free one")
    advertise: str | None = setting(
        None, metavar="HOST:PORT", help="where gateways and denoisers reach it", otherwise="where it listens"
    )
    tower: TowerConfig = part(TowerConfig)
    max_sessions: int = setting(64, least=1, metavar="N", help="sessions that a context holds at once; more of them wait")
    max_waiting: int = setting(
        256, least=1, metavar="N", help="sessions that wait for a context's memory; one more is refused as overload"
    )
    prefill_chunk: int = setting(
        128, least=1, metavar="N", help="prompt tokens of one forward, and of one chunk of a cached prefix"
    )
    prefill_budget: int = setting(
        512, least=1, metavar="N", help="prompt tokens of one iteration, so that a long prompt does not hold up commits"
    )
    prefix_memory: str = setting(
        "auto",
        unit="bytes",
        words=("auto", "0"),
        metavar="SIZE",
        help="memory of a context for cached prefixes, e.g. 8G; 0: none",
        otherwise="auto, a quarter of the state memory",
    )
    prefix_redis_memory: str = setting(
        "1G",
        unit="bytes",
        words=("0",),
        metavar="SIZE",
        help="memory in Redis for the cached prefixes of all contexts together; 0: none",
    )
    metrics_port: int | None = setting(
        None, least=0, most=65535, metavar="P", help="port of Prometheus metrics over HTTP; 0: any free one", otherwise="none"
    )
    silence_s: float = setting(
        5.0, unit="s", metavar="S", help="seconds after which a denoiser that says nothing loses its sessions"
    )

    def __post_init__(self) -> None:
        check(self)
