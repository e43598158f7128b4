"""Options that commands share with the services, and checks of the commands' own options."""

from __future__ import annotations

import argparse
import os
from typing import Any

from twotower.errors import ConfigError, InvalidArgument
from twotower.launcher.config import UpConfig
from twotower.service.config import DEFAULT_CHECKPOINT, ServiceConfig, TowerConfig
from twotower.settings.command_line import add_settings
from twotower.settings.declare import settings_of
from twotower.settings.sources import from_environment

__all__ = ["DEFAULT_CHECKPOINT", "DEFAULT_TARGET"]

DEFAULT_TARGET = "127.0.0.1:50051"


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """Add ``--checkpoint DIR``."""
    add_settings(parser, ServiceConfig, ["checkpoint"])


def add_place(parser: argparse.ArgumentParser) -> None:
    """Add ``--dtype``, ``--device``, ``--kernels``."""
    add_settings(parser, TowerConfig, ["dtype", "device", "kernels"])


def add_kernels(parser: argparse.ArgumentParser) -> None:
    """Add ``--kernels K``."""
    add_settings(parser, TowerConfig, ["kernels"])


def add_experts(parser: argparse.ArgumentParser) -> None:
    """Add ``--experts P`` and ``--context-experts P``, which is None if it is not given, and then equals the first."""
    add_settings(parser, TowerConfig, ["experts"])
    add_settings(parser, UpConfig, ["context_experts"])


def add_trace(parser: argparse.ArgumentParser) -> None:
    """Add ``--trace DIR``."""
    add_settings(parser, TowerConfig, ["trace"])


def add_stack_size(parser: argparse.ArgumentParser) -> None:
    """Add ``--contexts N``, ``--denoisers N``."""
    add_settings(parser, UpConfig, ["contexts", "denoisers"])


def not_given(name: str) -> Any:
    """The value of such an option if the command line does not set it. Raises ConfigError."""
    setting = settings_of(UpConfig)[name]
    found = from_environment(setting, os.environ)
    return setting.default if found is None else found[0]


def check_at_least_one(args: argparse.Namespace, *names: str) -> None:
    """Raise ConfigError unless each of these options that was given is at least 1."""
    for name in names:
        value = getattr(args, name)
        for one in value if isinstance(value, list) else [value]:
            if one is not None and one < 1:
                raise ConfigError(f"{name}: must be at least 1, not {one}")


def check_target(target: str) -> None:
    """Raise InvalidArgument unless `target` is HOST:PORT."""
    host, _, port = target.rpartition(":")
    if not host or not (port.isascii() and port.isdigit() and 1 <= int(port) <= 65535):
        raise InvalidArgument("target", f"must be HOST:PORT, not {target!r}")
