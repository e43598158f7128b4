"""`twotower up`: a stack until SIGTERM."""

from __future__ import annotations

import asyncio
import contextlib

from twotower.launcher.config import UpConfig
from twotower.launcher.process import Say
from twotower.launcher.stack import stack
from twotower.rpc.signals import stop_requested


async def run(config: UpConfig, say: Say) -> None:
    """Serve until SIGTERM or SIGINT, then drain. Prints the one ready line. Raises TwoTowerError."""
    stop = stop_requested()
    running = asyncio.create_task(_serve(config, say, stop))
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait((running, stopping), return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if stop.is_set():
        running.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await running


async def _serve(config: UpConfig, say: Say, stop: asyncio.Event) -> None:
    async with stack(config, say) as running:
        print(f"ready grpc={running.grpc_address} http={running.http_address}", flush=True)
        await running.failed()
