"""Keeps a replica's entry in the registry alive for as long as its process lives."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Protocol

from twotower.broker.registry import Replica
from twotower.errors import BrokerUnavailable

log = logging.getLogger(__name__)

INTERVAL_S = 1.0


class Announcer(Protocol):
    """What is needed of `broker.registry.Registry`."""

    async def announce(self, replica: Replica) -> bool | None:
        """Say that it lives; returns its standing order. Raises BrokerUnavailable."""
        ...


async def _as_before(order: bool | None) -> None:
    """Obeys no order."""


async def heartbeat(
    registry: Announcer, describe: Callable[[], Replica], obey: Callable[[bool | None], Awaitable[None]] = _as_before
) -> None:
    """Announce `describe()` once a second, until cancelled. A Redis that is away is logged once, and tried again.

    obey: is given the standing order each time, to drain or not to; None: there is none, or Redis is away.
    """
    away = False
    while True:
        order = None
        try:
            order = await registry.announce(describe())
            if away:
                log.warning("Redis answers again")
            away = False
        except BrokerUnavailable as error:
            if not away:
                log.warning("%s", error)
            away = True
        await obey(order)
        await asyncio.sleep(INTERVAL_S)
