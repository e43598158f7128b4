"""`twotower up`: runs a stack until SIGTERM."""

from __future__ import annotations

import asyncio
import contextlib
import signal

from twotower.launcher.config import UpConfig
from twotower.launcher.process import Say
from twotower.launcher.stack import stack


async def run(config: UpConfig, say: Say) -> None:
    """Serve until SIGTERM or SIGINT, then drain; a second signal ends the drain at once.

    Prints the one ready line. Raises TwoTowerError if the stack does not start.
    """
    stop, hurry = _signals(say)
    running = asyncio.create_task(_serve(config, say, hurry))
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait((running, stopping), return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if stop.is_set():
        running.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await running


async def _serve(config: UpConfig, say: Say, hurry: asyncio.Event) -> None:
    async with stack(config, say, hurry) as running:
        print(f"ready grpc={running.grpc_address} http={running.http_address}", flush=True)
        await running.serve()


def _signals(say: Say) -> tuple[asyncio.Event, asyncio.Event]:
    """The events that the first and the second SIGTERM or SIGINT set."""
    stop, hurry = asyncio.Event(), asyncio.Event()

    def signalled() -> None:
        if stop.is_set() and not hurry.is_set():
            say("[up] second signal: not waiting for running requests")
            hurry.set()
        stop.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, signalled)
    return stop, hurry
