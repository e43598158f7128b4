"""Prompts that begin alike meet on one context, and the gateway tells how often."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import httpx

from tests.support.gateways import RunningGateway, gateway, replica
from tests.support.scripted_context import ScriptedContext
from tests.support.waiting import until
from twotower.gateway.prefixes import PromptChains, SentPrefixes
from twotower.prefix.chain import ChainSpec, pack_links, short

SPEC = ChainSpec("x", "float32", 4)
SYSTEM = list(range(10, 22))
"""Three chunks."""


async def _metric(running: RunningGateway, name: str) -> float:
    async with httpx.AsyncClient() as client:
        text = (await client.get(running.http + "/metrics")).text
    return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(name + " "))


async def test_sessions_go_where_their_prefix_is_announced_and_where_it_was_sent(checkpoint: Path) -> None:
    contexts = [ScriptedContext([7] * 100) for _ in range(3)]
    keeps = [
        dataclasses.replace(replica("context", f"c{i}", await context.start()), dtype=SPEC.dtype, chunk_tokens=4)
        for i, context in enumerate(contexts)
    ]
    keeps[2] = dataclasses.replace(keeps[2], prefixes=pack_links(SPEC.chain(SYSTEM)[2:]))
    async with gateway(checkpoint, replicas=keeps) as running, running.client() as client:

        async def ask(prompt: list[int]) -> None:
            assert [event async for event in client.generate(prompt, max_tokens=4)]

        for tail in range(4):
            await ask([*SYSTEM, 50 + tail])
        assert [len(context.opened) for context in contexts] == [0, 0, 4]
        other = [30, 31, 32, 33, 34, 35]
        for tail in range(4):
            await ask([*other, 50 + tail])
        assert sorted(len(context.opened) for context in contexts[:2]) in ([0, 0], [0, 4])
        assert await _metric(running, 'twotower_gateway_sessions_routed_total{by="prefix"}') == 4 + 3
        assert await _metric(running, 'twotower_gateway_sessions_routed_total{by="load"}') == 1
        assert await _metric(running, "twotower_gateway_expected_prefix_tokens_total") == 4 * 12 + 3 * 4
    for context in contexts:
        await context.stop()


async def test_a_session_goes_on_elsewhere_when_the_holder_of_its_prefix_is_gone(checkpoint: Path) -> None:
    gone, there = ScriptedContext([7] * 100), ScriptedContext([7] * 100)
    holder = dataclasses.replace(replica("context", "gone", await gone.start()), dtype=SPEC.dtype, chunk_tokens=4)
    holder = dataclasses.replace(holder, prefixes=pack_links(SPEC.chain(SYSTEM)))
    await gone.stop()
    async with gateway(checkpoint, there, replicas=[holder]) as running, running.client() as client:
        events = [event async for event in client.generate(SYSTEM, max_tokens=4)]
        assert events
        await until(lambda: there.opened)


def test_a_prompts_chain_is_made_once_for_each_way_to_chunk() -> None:
    chains, other = PromptChains(SYSTEM), dataclasses.replace(SPEC, chunk_tokens=6)
    assert chains.of(SPEC) == [short(link) for link in SPEC.chain(SYSTEM)]
    assert chains.of(other) == [short(link) for link in other.chain(SYSTEM)]
    assert chains.of(dataclasses.replace(SPEC)) is chains.of(SPEC)


def test_what_was_sent_is_remembered_up_to_a_bound() -> None:
    sent, old, new = SentPrefixes(limit=6), SPEC.chain([1] * 16), SPEC.chain([2] * 16)
    sent.add(old, "a")
    sent.add(new, "a")
    assert sent.chunks(new, "a", ()) == 4
    assert sent.chunks(old, "a", ()) == 2
    assert sent.chunks(new, "b", ()) == 0
    sent.add(new[:2], "b")
    assert sent.chunks(new[:2], "b", ()) == 2
    assert sent.chunks(new, "a", ()) == 4
