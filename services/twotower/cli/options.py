"""Options that several commands share, and how their words are read."""

from __future__ import annotations

import argparse
import math
import os
from pathlib import Path

from twotower.broker.environment import REDIS_VARIABLE
from twotower.errors import ConfigError, InvalidArgument
from twotower.transport.config import AUTO, CHOICES

DEFAULT_CHECKPOINT = Path(__file__).resolve().parent.parent / "checkpoints" / "word-problems"
"""The small checkpoint that ships with the package."""

DEFAULT_TARGET = "127.0.0.1:50051"
DEFAULT_REDIS = "redis://127.0.0.1:6379"


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """``--checkpoint DIR``."""
    parser.add_argument(
        "--checkpoint",
        type=Path,
        default=DEFAULT_CHECKPOINT,
        metavar="DIR",
        help="checkpoint directory (default: the one that ships)",
    )


def add_revision(parser: argparse.ArgumentParser) -> None:
    """``--revision NAME``."""
    parser.add_argument(
        "--revision",
        metavar="NAME",
        help="what tells the checkpoint from others of its shape, if it holds no hash of its content and is no snapshot in the "
        "Hugging Face cache; services that are given the same share states in Redis",
    )


def add_redis(parser: argparse.ArgumentParser, default: str | None, meaning: str) -> None:
    """``--redis URL``. default: where neither it nor the environment names one, which `meaning` says."""
    parser.add_argument(
        "--redis",
        default=os.environ.get(REDIS_VARIABLE) or default,
        metavar="URL",
        help=f"Redis >= 7 or Valkey; better given by ${REDIS_VARIABLE} if it holds a password (default: {meaning})",
    )


def add_place(parser: argparse.ArgumentParser) -> None:
    """``--dtype``, ``--device``, ``--kernels``."""
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"), help="auto: the checkpoint's")
    parser.add_argument("--device", default="auto", help="auto (CUDA where there is one), cpu, cuda, cuda:N")
    add_kernels(parser)


def add_kernels(parser: argparse.ArgumentParser) -> None:
    """``--kernels K``."""
    parser.add_argument(
        "--kernels",
        default=default_kernels(),
        help="what computes: torch (the reference), cpu (C++), triton, auto: by device (default: $TWOTOWER_KERNELS, or auto)",
        metavar="K",
    )


def default_kernels() -> str:
    """What the environment asks for."""
    return os.environ.get("TWOTOWER_KERNELS") or "auto"


def add_experts(parser: argparse.ArgumentParser) -> None:
    """``--experts P``."""
    parser.add_argument(
        "--experts",
        default="auto",
        choices=("auto", "bf16", "fp8", "fp4"),
        help="precision of the routed experts, quantized at load (auto: as the checkpoint stores them)",
    )


def add_context_experts(parser: argparse.ArgumentParser, default: str | None, meaning: str) -> None:
    """``--context-experts P``. default: where it is not given, which `meaning` says."""
    parser.add_argument(
        "--context-experts",
        default=default,
        choices=("auto", "bf16", "fp8", "fp4"),
        help=f"precision of the context tower's experts (default: {meaning})",
    )


def add_state_memory(parser: argparse.ArgumentParser) -> None:
    """``--state-memory SIZE``."""
    parser.add_argument(
        "--state-memory",
        default="auto",
        metavar="SIZE",
        help="memory for the states of sessions, e.g. 40G (auto: a quarter of the machine's, or most of what a GPU has left)",
    )


def add_prefix_memory(parser: argparse.ArgumentParser) -> None:
    """``--prefix-memory SIZE``, ``--prefix-redis-memory SIZE``."""
    parser.add_argument(
        "--prefix-memory",
        default="auto",
        metavar="SIZE",
        help="of a context, for cached prefixes, e.g. 8G (auto: a quarter of the state memory; 0: none)",
    )
    parser.add_argument(
        "--prefix-redis-memory", default="1G", metavar="SIZE", help="for cached prefixes in Redis (default 1G; 0: none)"
    )


def add_trace(parser: argparse.ArgumentParser) -> None:
    """``--trace DIR``."""
    parser.add_argument("--trace", type=Path, metavar="DIR", help="record what the engines do (see `twotower trace`)")


def add_transport(parser: argparse.ArgumentParser) -> None:
    """``--transport KIND``."""
    parser.add_argument(
        "--transport",
        default=AUTO,
        choices=CHOICES,
        help="how states get to denoisers: auto (the best that both ends can), in frames, shared memory, torch.distributed",
    )


def add_drain(parser: argparse.ArgumentParser) -> None:
    """``--drain S``."""
    parser.add_argument(
        "--drain", type=float, default=30.0, metavar="S", help="seconds running requests may take after SIGTERM"
    )


def add_stack_size(parser: argparse.ArgumentParser) -> None:
    """``--contexts N``, ``--denoisers N``."""
    parser.add_argument("--contexts", type=int, default=1, metavar="N", help="context replicas (default 1)")
    parser.add_argument("--denoisers", type=int, default=1, metavar="N", help="denoiser workers (default 1)")


def check_at_least_one(args: argparse.Namespace, *names: str) -> None:
    """Raise ConfigError unless each of these options, where given, is at least 1."""
    for name in names:
        value = getattr(args, name)
        for one in value if isinstance(value, list) else [value]:
            if one is not None and one < 1:
                raise ConfigError(f"{name}: must be at least 1, not {one}")


def check_drain(args: argparse.Namespace) -> None:
    """Raise ConfigError unless ``--drain`` is a time."""
    if not (args.drain >= 0 and math.isfinite(args.drain)):  # also refuses NaN
        raise ConfigError(f"drain: must be a finite number of seconds, not {args.drain}")


def check_target(target: str) -> None:
    """Raise InvalidArgument unless `target` is HOST:PORT."""
    host, _, port = target.rpartition(":")
    if not host or not (port.isascii() and port.isdigit() and 1 <= int(port) <= 65535):
        raise InvalidArgument("target", f"must be HOST:PORT, not {target!r}")
