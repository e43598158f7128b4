"""Settings of a denoiser worker."""

from __future__ import annotations

from dataclasses import dataclass

from twotower.service.config import ServiceConfig, TowerConfig, context_experts
from twotower.settings.declare import part, setting
from twotower.settings.values import check


@dataclass(frozen=True, slots=True)
class DenoiserConfig:
    """Made once, at the edge; every field has its final value."""

    service: ServiceConfig = part(ServiceConfig)
    port: int = setting(0, least=0, most=65535, metavar="P", help="port of health checks; 0: any free one")
    tower: TowerConfig = part(TowerConfig)
    context_experts: str = context_experts("auto", "auto, as the checkpoint stores them")
    slots: int = setting(8, least=1, metavar="N", help="sessions that a denoiser refines together")

    metrics_port: int | None = setting(
        None, least=0, most=65535, metavar="P", help="port of Prometheus metrics over HTTP; 0: any free one", otherwise="none"
    )

    def __post_init__(self) -> None:
        check(self)
