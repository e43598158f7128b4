"""The commands that are services, and the classes of their settings."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from types import MappingProxyType
from typing import TypeVar

from twotower.context.config import ContextConfig
from twotower.denoiser.config import DenoiserConfig
from twotower.gateway.config import GatewayConfig
from twotower.launcher.config import UpConfig
from twotower.settings.command_line import add_config, given
from twotower.settings.sources import load

C = TypeVar("C")

WHAT = MappingProxyType(
    {
        "up": "start the whole stack on this machine",
        "gateway": "what clients talk to, over gRPC and HTTP",
        "context": "the context tower: reads prompts, keeps the state of sessions",
        "denoiser": "a denoising worker: pulls sessions, writes their blocks",
    }
)
SERVICES = MappingProxyType({"up": UpConfig, "gateway": GatewayConfig, "context": ContextConfig, "denoiser": DenoiserConfig})


def add_service(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], name: str, run: Callable[[argparse.Namespace], None]
) -> None:
    """Register a command with all settings of its class."""
    parser = commands.add_parser(name, help=WHAT[name], description=WHAT[name], allow_abbrev=False)
    add_config(parser, SERVICES[name])
    parser.set_defaults(run=run)


def read(config: type[C], name: str, args: argparse.Namespace, **plain: object) -> C:
    """The settings of a command, from its arguments, the environment and a file. Raises ConfigError."""
    return load(config, name, SERVICES, given(args, config), **plain)
