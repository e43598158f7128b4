"""`twotower gateway`, `context`, `denoiser`: one service each, as containers run them."""

from __future__ import annotations

import argparse
import asyncio

from twotower.cli.commands import add_service, read
from twotower.context.config import ContextConfig
from twotower.denoiser.config import DenoiserConfig
from twotower.gateway.config import GatewayConfig


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the three commands."""
    for name, run in (("gateway", run_gateway), ("context", run_context), ("denoiser", run_denoiser)):
        add_service(commands, name, run)


def run_gateway(args: argparse.Namespace) -> None:
    """Serve until SIGTERM."""
    config = read(GatewayConfig, "gateway", args)
    from twotower.gateway.main import run

    asyncio.run(run(config))


def run_context(args: argparse.Namespace) -> None:
    """Serve until SIGTERM."""
    config = read(ContextConfig, "context", args)
    from twotower.context.main import run

    asyncio.run(run(config))


def run_denoiser(args: argparse.Namespace) -> None:
    """Work until SIGTERM."""
    config = read(DenoiserConfig, "denoiser", args)
    from twotower.denoiser.main import run

    asyncio.run(run(config))
