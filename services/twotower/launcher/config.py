"""Settings of a stack on one machine: those of its services, and its own."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from twotower.context.config import ContextConfig
from twotower.denoiser.config import DenoiserConfig
from twotower.errors import ConfigError
from twotower.gateway.config import GatewayConfig
from twotower.service.config import ServiceConfig, TowerConfig, context_experts
from twotower.settings.build import build
from twotower.settings.declare import like, part, setting
from twotower.settings.values import check

FEW_CORES = 4
"""A tower whose share is fewer cores than this is faster if it takes turns on all cores, up to `MOST_CORES` of them."""
MOST_CORES = 8
"""One operation does not keep more cores than this busy."""


def usable_cores() -> int:
    """The CPUs that this process may use: in a container, often fewer than the machine has."""
    return len(os.sched_getaffinity(0))


@dataclass(frozen=True, slots=True)
class UpConfig:
    """The settings of a stack, made once at the edge; every field has its final value.

    Settings that the stack decides for its services are set here, except those that are known only once it starts.
    """

    contexts: int = setting(1, least=1, metavar="N", help="context replicas")
    denoisers: int = setting(1, least=1, metavar="N", help="denoiser workers")
    redis_url: str | None = like(ServiceConfig, "redis_url", None, otherwise="an embedded one, which ends with the stack")
    threads: int | None = like(
        TowerConfig,
        "threads",
        None,
        help="CPU threads of each tower",
        otherwise="cores / towers; all of them, in turns, where these are few",
    )
    context_experts: str | None = context_experts(None, "as --experts")
    unhealthy_after_s: float = setting(
        10.0,
        unit="s",
        metavar="S",
        help="seconds that a service may not answer before it is killed and started again; 0: as long as it likes",
    )
    start_s: float = setting(
        600.0, name="start_timeout", unit="s", metavar="S", help="seconds that a service may take to load its tower"
    )
    gateway: GatewayConfig = part(GatewayConfig, "the gateway", without=("max_in_flight",))
    context: ContextConfig = part(ContextConfig, "each context", without=("host", "port", "advertise", "turns", "metrics_port"))
    denoiser: DenoiserConfig = part(DenoiserConfig, "each denoiser", without=("host", "port", "turns", "metrics_port"))
    debug: bool = False
    """Whether services log in detail."""

    def __post_init__(self) -> None:
        check(self)
        if self.gateway.grpc_port == self.gateway.http_port != 0:
            raise ConfigError(f"http_port: {self.gateway.http_port} is the gRPC port; the two need one each")
        experts = self.context_experts or self.denoiser.tower.experts
        # The gateway refuses requests that the contexts cannot hold.
        room = self.contexts * self.context.max_sessions
        gateway = dataclasses.replace(self.gateway, context_experts=experts, max_in_flight=room)
        tower = dataclasses.replace(self.context.tower, experts=experts, threads=self.tower_threads)
        context = dataclasses.replace(self.context, tower=tower)
        tower = dataclasses.replace(self.denoiser.tower, threads=self.tower_threads)
        denoiser = dataclasses.replace(self.denoiser, context_experts=experts, tower=tower)
        for name, final in (("gateway", gateway), ("context", context), ("denoiser", denoiser)):
            object.__setattr__(self, name, final)

    @property
    def tower_threads(self) -> int:
        """CPU threads of each tower: an equal share of the cores; where that would be too few, all of them in turns."""
        cores, towers = usable_cores(), self.contexts + self.denoisers
        # If there are more towers than cores, one thread each keeps the cores busy.
        few = towers <= cores < FEW_CORES * towers and cores <= MOST_CORES
        return self.threads or (cores if few else max(1, cores // towers))

    @property
    def turns(self) -> bool:
        """Whether the towers take turns on the cores, because each uses all of them."""
        return self.tower_threads >= usable_cores()


def on_free_ports(checkpoint: Path, **settings: Any) -> UpConfig:
    """The settings of a stack on any free ports; `settings` are fields of it and of its services. Raises ConfigError."""
    return build(UpConfig, checkpoint=checkpoint, grpc_port=0, http_port=0, **settings)
