"""What a gateway makes of the registry's answers."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest

from twotower.broker.registry import Replica, ReplicaKind
from twotower.errors import BrokerUnavailable
from twotower.gateway.prefixes import PromptChains
from twotower.gateway.replicas import DETOUR_SESSIONS, FORGOTTEN_S, ReplicaPool
from twotower.prefix.chain import ChainSpec, pack_links

KEEP_S = 30.0
SPEC = ChainSpec("x", "float32", 4)
SYSTEM = list(range(100, 116))
"""Four chunks."""


class Registry:
    """Says what it is told to."""

    def __init__(self) -> None:
        self.away = False
        self.named: dict[ReplicaKind, list[Replica]] = {"context": [], "denoiser": []}

    def name(self, contexts: int, denoisers: int) -> None:
        """So many of each live."""
        counts: dict[ReplicaKind, int] = {"context": contexts, "denoiser": denoisers}
        for kind, count in counts.items():
            self.named[kind] = [Replica(kind, f"{kind}-{i}", f"127.0.0.1:{1000 + i}", "x", 0, 8) for i in range(count)]

    async def replicas(self, kind: ReplicaKind) -> Sequence[Replica]:
        if self.away:
            raise BrokerUnavailable("Redis does not answer")
        return self.named.get(kind, [])


async def test_a_registry_that_forgot_everybody_is_not_believed_at_once() -> None:
    now, registry = 0.0, Registry()
    pool = ReplicaPool(registry, KEEP_S, lambda: now)
    await pool.refresh()
    assert (pool.contexts, pool.denoisers) == (0, 0)
    registry.name(2, 3)
    await pool.refresh()
    assert (pool.contexts, pool.denoisers) == (2, 3)
    registry.name(0, 0)  # Redis was restarted, and it took longer than that
    now += 2 * FORGOTTEN_S
    await pool.refresh()
    now += FORGOTTEN_S / 2
    await pool.refresh()
    assert (pool.contexts, pool.denoisers) == (2, 3)
    assert pool.pick() is not None
    registry.name(1, 0)  # one was quick
    await pool.refresh()
    assert (pool.contexts, pool.denoisers) == (1, 3)
    registry.name(0, 0)  # and now all are really gone
    await pool.refresh()
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


@asynccontextmanager
async def contexts(*holds: Sequence[bytes], loads: Sequence[int] = (), capacity: int = 8) -> AsyncIterator[ReplicaPool]:
    """A pool of contexts 0, 1, ... that announce to hold these links, and a load."""
    registry = Registry()
    registry.named["context"] = [
        Replica("context", f"c{i}", str(i), "x", load, capacity, SPEC.dtype, SPEC.chunk_tokens, pack_links(links))
        for i, (links, load) in enumerate(zip(holds, loads or [0] * len(holds), strict=True))
    ]
    pool = ReplicaPool(registry, KEEP_S, lambda: 0.0)
    await pool.refresh()
    yield pool
    await pool.close()


def picked(pool: ReplicaPool, prompt: Sequence[int]) -> str:
    replica = pool.pick((), PromptChains(prompt))
    assert replica is not None
    return replica.address


async def test_a_prompt_goes_where_most_of_its_prefix_is() -> None:
    system = SPEC.chain(SYSTEM)
    async with contexts([], system[1:2], system[3:], loads=(0, 1, 2)) as pool:
        assert picked(pool, [*SYSTEM, 1, 2, 3]) == "2"
        assert picked(pool, SYSTEM[:12]) == "1"  # a state behind the fourth chunk is none behind the third
        assert picked(pool, SYSTEM[:7]) == "0"
        assert picked(pool, [1, *SYSTEM]) == "0"
        assert picked(pool, [1]) == "0"
        replica = pool.pick((), PromptChains(SYSTEM))
        assert replica is not None
        assert pool.expected_tokens(replica, PromptChains(SYSTEM)) == len(SYSTEM)
        second = pool.pick([replica], PromptChains(SYSTEM))
        assert second is not None
        assert second.address == "1"


@pytest.mark.parametrize(
    ("capacity", "load", "chosen"),
    [(4, DETOUR_SESSIONS, "0"), (4, DETOUR_SESSIONS + 1, "1"), (64, 16, "0"), (64, 17, "1")],
)
async def test_but_not_to_one_that_is_overloaded(capacity: int, load: int, chosen: str) -> None:
    async with contexts(SPEC.chain(SYSTEM), [], loads=(5 + load, 5), capacity=capacity) as pool:
        assert picked(pool, SYSTEM) == chosen


async def test_then_to_the_next_best() -> None:
    system = SPEC.chain(SYSTEM)
    async with contexts(system, system[:1], [], loads=(8, 2, 0)) as pool:
        assert picked(pool, SYSTEM) == "1"


async def test_of_two_that_hold_as_much_the_less_loaded_is_taken() -> None:
    system = SPEC.chain(SYSTEM)
    async with contexts(system, system, [], loads=(2, 1, 0)) as pool:
        assert picked(pool, SYSTEM) == "1"


async def test_where_a_prompt_was_sent_is_remembered_before_it_is_announced() -> None:
    async with contexts([], [], [], loads=(0, 1, 2)) as pool:
        prompt = PromptChains([*SYSTEM, 1, 2, 3, 4])
        least = pool.pick((), prompt)
        assert least is not None
        second = pool.pick([least], prompt)
        assert second is not None
        assert second.address == "1"
        pool.sent(second, prompt)
        assert picked(pool, [*SYSTEM, 5, 6, 7, 8]) == "1"
        assert picked(pool, [5, *SYSTEM]) == "0"


async def test_contexts_that_keep_no_prefixes_or_chunk_otherwise() -> None:
    registry = Registry()
    told = [
        Replica("context", "c0", "0", "x", 0, 8),
        Replica("context", "c1", "1", "x", 1, 8, "bfloat16", 4, pack_links(SPEC.chain(SYSTEM))),
        Replica("context", "c2", "2", "x", 2, 8, "float32", 8, pack_links(ChainSpec("x", "float32", 8).chain(SYSTEM))),
    ]
    registry.named["context"] = told[:2]
    pool = ReplicaPool(registry, KEEP_S, lambda: 0.0)
    await pool.refresh()
    assert picked(pool, SYSTEM) == "0"
    registry.named["context"] = told
    await pool.refresh()
    assert picked(pool, SYSTEM) == "2"
    await pool.close()
