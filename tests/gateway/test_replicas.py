"""What a gateway makes of the registry's answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from twotower.broker.registry import Kind, Replica
from twotower.errors import BrokerUnavailable
from twotower.gateway.replicas import FORGOTTEN_S, ReplicaPool

KEEP_S = 30.0


class Registry:
    """Says what it is told to."""

    def __init__(self) -> None:
        self.away = False
        self.named: dict[Kind, list[Replica]] = {"context": [], "denoiser": []}

    def name(self, contexts: int, denoisers: int) -> None:
        """So many of each live."""
        for kind, count in (("context", contexts), ("denoiser", denoisers)):
            self.named[kind] = [Replica(kind, f"{kind}-{i}", f"127.0.0.1:{1000 + i}", "x", 0, 8) for i in range(count)]

    async def replicas(self, kind: Kind) -> Sequence[Replica]:
        if self.away:
            raise BrokerUnavailable("Redis does not answer")
        return self.named[kind]


async def test_a_registry_that_forgot_everybody_is_not_believed_at_once() -> None:
    now, registry = 0.0, Registry()
    pool = ReplicaPool(registry, KEEP_S, lambda: now)
    await pool.refresh()
    assert (pool.contexts, pool.denoisers) == (0, 0)
    registry.name(2, 3)
    await pool.refresh()
    assert (pool.contexts, pool.denoisers) == (2, 3)
    registry.name(0, 0)  # Redis was restarted
    now += FORGOTTEN_S / 2
    await pool.refresh()
    assert (pool.contexts, pool.denoisers) == (2, 3)
    assert pool.pick() is not None
    registry.name(1, 0)  # one was quick
    await pool.refresh()
    assert (pool.contexts, pool.denoisers) == (1, 3)
    registry.name(0, 0)  # and now all are really gone
    now += FORGOTTEN_S
    await pool.refresh()
    assert (pool.contexts, pool.denoisers) == (0, 0)
    assert pool.pick() is None
    await pool.close()


async def test_a_registry_that_is_away_is_replaced_by_its_last_word_for_a_while() -> None:
    now, registry = 0.0, Registry()
    pool = ReplicaPool(registry, KEEP_S, lambda: now)
    registry.name(1, 1)
    await pool.refresh()
    registry.away = True
    now += KEEP_S - 1
    await pool.refresh()
    assert (pool.contexts, pool.denoisers) == (1, 1)
    now += 2
    await pool.refresh()
    assert (pool.contexts, pool.denoisers) == (0, 0)
    await pool.close()


async def test_what_drains_takes_nothing_new() -> None:
    registry = Registry()
    pool = ReplicaPool(registry, KEEP_S, lambda: 0.0)
    registry.name(2, 2)
    for kind in registry.named:
        registry.named[kind][0] = dataclasses.replace(registry.named[kind][0], capacity=0)
    await pool.refresh()
    assert (pool.contexts, pool.denoisers) == (1, 1)
    await pool.close()
