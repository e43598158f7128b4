"""Settings that all services have, and those that both towers have."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from twotower.settings.declare import Secret, setting
from twotower.settings.values import check
from twotower.transport.config import AUTO, CHOICES

DEFAULT_CHECKPOINT = Path(__file__).resolve().parent.parent / "checkpoints" / "word-problems"
"""The small checkpoint that ships with the package."""

REDIS_VARIABLE = "TWOTOWER_REDIS_URL"

EXPERTS = ("auto", "bf16", "fp8", "fp4")


def context_experts(default: str | None, otherwise: str) -> Any:
    """A field of services that are no contexts. The precision is a part of the identity by which services find each other."""
    return setting(default, choices=EXPERTS, help="precision of the context tower's experts", otherwise=otherwise)


@dataclass(frozen=True, slots=True)
class ServiceConfig:
    """Of every service."""

    checkpoint: Path = setting(DEFAULT_CHECKPOINT, metavar="DIR", help="checkpoint directory", otherwise="the one that ships")
    revision: str | None = setting(
        None,
        metavar="NAME",
        help="what tells the checkpoint from others of its shape, if it holds no hash of its content and is no snapshot in the "
        "Hugging Face cache; services that are given the same share states in Redis",
    )
    redis_url: str = setting(
        "redis://127.0.0.1:6379",
        name="redis",
        variables=(REDIS_VARIABLE, "TWOTOWER_REDIS"),
        secret=Secret.PASSWORD,
        metavar="URL",
        help=f"Redis >= 7 or Valkey; one with a password is given by ${REDIS_VARIABLE}",
    )
    host: str = setting("127.0.0.1", metavar="HOST", help="address to listen on")
    drain_s: float = setting(30.0, unit="s", metavar="S", help="seconds that running requests may take after SIGTERM")

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, slots=True)
class TowerConfig:
    """Of a service that computes: a context or a denoiser."""

    dtype: str = setting(
        "auto",
        choices=("auto", "float32", "bfloat16"),
        help="type of the weights and states",
        otherwise="auto, the checkpoint's",
    )
    device: str = setting(
        "auto", metavar="DEVICE", help="where it computes: cpu, cuda or cuda:N", otherwise="auto, CUDA where there is a device"
    )
    kernels: str = setting(
        "auto", metavar="K", help="what computes: torch (the reference), cpu (C++) or triton", otherwise="auto, by the device"
    )
    experts: str = setting(
        "auto",
        choices=EXPERTS,
        help="precision of the routed experts, quantized at load",
        otherwise="auto, as the checkpoint stores them",
    )
    transport: str = setting(
        AUTO,
        choices=CHOICES,
        help="how states get to denoisers: in frames, through shared memory, by torch.distributed",
        otherwise="auto, the best that both ends can use",
    )
    threads: int = setting(1, least=1, metavar="N", help="CPU threads")
    turns: Path | None = setting(
        None, metavar="FILE", help="take turns on the CPU cores with the towers of this machine that name the same file"
    )
    state_memory: str = setting(
        "auto",
        unit="bytes",
        words=("auto",),
        metavar="SIZE",
        help="memory for the states of sessions, e.g. 40G; fewer sessions are held if it is short",
        otherwise="auto, a quarter of the machine's or most of what a GPU has left",
    )
    trace: Path | None = setting(None, metavar="DIR", help="record what the engines do (see `twotower trace`)")
    stall_s: float = setting(
        30.0,
        unit="s",
        metavar="S",
        help="seconds after which a forward that has not returned, and takes far longer than any before, ends the process",
    )

    def __post_init__(self) -> None:
        check(self)
