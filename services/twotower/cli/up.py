"""`twotower up`: the whole stack on this machine."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import sys

from twotower.cli.commands import add_service, read
from twotower.launcher.config import UpConfig


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the command."""
    add_service(commands, "up", run)


def run(args: argparse.Namespace) -> None:
    """Serve until SIGTERM."""
    config = read(UpConfig, "up", args, debug=args.debug)
    from twotower.launcher import up

    asyncio.run(up.run(config, _say))


def _say(line: str) -> None:
    """Print a line; the stack goes on even if its reader has gone."""
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)
