"""Keeps a replica's entry in the registry alive for as long as its process lives."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from twotower.broker.registry import Registry, Replica
from twotower.errors import BrokerUnavailable

log = logging.getLogger(__name__)

INTERVAL_S = 1.0


async def heartbeat(registry: Registry, describe: Callable[[], Replica]) -> None:
    """Announce `describe()` once a second, until cancelled. If Redis is away, this is logged once, and tried again."""
    away = False
    while True:
        try:
            await registry.announce(describe())
            if away:
                log.warning("Redis answers again")
            away = False
        except BrokerUnavailable as error:
            if not away:
                log.warning("%s", error)
            away = True
        await asyncio.sleep(INTERVAL_S)
