"""SIGTERM and SIGINT as an event that a service can wait for."""

from __future__ import annotations

import asyncio
import signal


def stop_requested() -> asyncio.Event:
    """An event that SIGTERM or SIGINT sets. Call it in the main thread, inside the running loop.

    A second signal changes nothing: a drain that has begun continues (SIGKILL ends it).
    """
    event = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, event.set)
    return event
