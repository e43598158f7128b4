"""`/v1/pool`, the metrics that say the same, and requests that are held while a first replica starts."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.gateways import gateway, replica
from tests.support.scripted_context import ScriptedContext
from tests.support.waiting import until
from twotower.errors import BrokerUnavailable, ConfigError, DeadlineExceeded
from twotower.events import Accepted
from twotower.gateway.config import GatewayConfig
from twotower.request import Mode
from twotower.wire.params import params_from_pb

from .test_failures import SCRIPT, collect


async def pool_of(base: str) -> dict[str, Any]:
    async with httpx.AsyncClient(base_url=base) as client:
        return (await client.get("/v1/pool")).json()  # type: ignore[no-any-return]


async def metric(base: str, name: str) -> float:
    async with httpx.AsyncClient(base_url=base) as client:
        text = (await client.get("/metrics")).text
    return next(float(line.split()[1]) for line in text.splitlines() if line.startswith(f"{name} "))


async def until_pool(base: str, holds: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    async with asyncio.timeout(10):
        while not holds(pool := await pool_of(base)):  # noqa: ASYNC110  # the gateway is asked over HTTP
            await asyncio.sleep(0.05)
    return pool


async def until_wanted(base: str, role: str, count: int) -> dict[str, Any]:
    return await until_pool(base, lambda pool: pool[role]["wanted"] == count)


async def until_ready_is(base: str, reason: str | None) -> None:
    """reason: why it is not; None: it is."""
    async with asyncio.timeout(10), httpx.AsyncClient(base_url=base) as client:
        while True:
            if (await client.get("/readyz")).json().get("reason") == reason:
                return
            await asyncio.sleep(0.02)


async def test_what_is_wanted_follows_what_replicas_announce(checkpoint: Path) -> None:
    async with gateway(checkpoint, ScriptedContext(SCRIPT)) as running:
        pool = await until_wanted(running.http, "denoisers", 1)
        assert (pool["denoisers"]["live"], pool["denoisers"]["slots"], pool["contexts"]["wanted"]) == (1, 64, 1)
        busy = dataclasses.replace(running.replicas.denoisers[0], load=8, capacity=8, refining=5, tokens_per_forward=1.8)
        draining = dataclasses.replace(busy, name="d1", load=0, capacity=0, refining=0, draining=True, sick="why")
        running.replicas.denoisers = [busy, draining]
        running.replicas.contexts[0] = dataclasses.replace(running.replicas.contexts[0], load=20, waiting=12, oldest_s=1.0)
        pool = await until_wanted(running.http, "denoisers", 4)
        denoisers = pool["denoisers"]
        assert "8 sessions run and 12 wait" in denoisers["why"]
        about = ("live", "draining", "slots", "load", "waiting", "oldest_s", "min", "max", "refining")
        assert [denoisers[key] for key in about] == [1, 1, 8, 8, 12, 1.0, 1, 16, 5]
        one, other = denoisers["replicas"]
        assert (one["name"], one["slots"], one["load"], one["tokens_per_forward"], one["sick"]) == ("d0", 8, 8, 1.8, None)
        assert (other["draining"], other["drained"], other["sick"]) == (True, True, "why")
        assert await metric(running.http, "twotower_denoisers_wanted") == 4
        assert await metric(running.http, "twotower_contexts_wanted") == 1
        running.replicas.error = BrokerUnavailable("Redis does not answer")  # says nothing about need
        await asyncio.sleep(1.2)
        assert (await pool_of(running.http))["denoisers"]["wanted"] == 4


async def test_from_zero_requests_are_held(checkpoint: Path) -> None:
    """A gateway without any denoiser is ready; what it holds is what makes it want one; the answer comes once there is one."""
    async with (
        gateway(checkpoint, ScriptedContext(SCRIPT), denoisers=0, min_denoisers=0) as running,
        running.client() as client,
    ):
        assert (await pool_of(running.http))["denoisers"]["wanted"] == 0
        held = [asyncio.create_task(collect(client, max_tokens=8)) for _ in range(3)]
        pool = await until_wanted(running.http, "denoisers", 1)
        assert pool["denoisers"]["live"] == 0
        assert "3 wait" in pool["denoisers"]["why"] or "1 wait" in pool["denoisers"]["why"]
        assert not any(task.done() for task in held)
        running.replicas.denoisers.append(replica("denoiser", "first", "127.0.0.1:1"))
        assert [ids for ids, _ in await asyncio.gather(*held)] == [SCRIPT[:8]] * 3
        await until(lambda: not any(gateway.waiting for gateway in running.replicas.gateways.values()))


async def test_a_context_from_zero(checkpoint: Path) -> None:
    context = ScriptedContext(SCRIPT)
    async with gateway(checkpoint, min_contexts=0) as running, running.client() as client:
        held = asyncio.create_task(collect(client, max_tokens=8))
        await until_wanted(running.http, "contexts", 1)
        running.replicas.contexts.append(replica("context", "first", await context.start()))
        assert (await held)[0] == SCRIPT[:8]
    await context.stop()


async def test_what_is_held_keeps_its_deadline(checkpoint: Path) -> None:
    async with (
        gateway(checkpoint, ScriptedContext(SCRIPT), denoisers=0, min_denoisers=0) as running,
        running.client() as client,
    ):
        with pytest.raises(DeadlineExceeded):
            await collect(client, timeout_s=0.3)


async def test_a_client_that_leaves_is_held_no_longer(checkpoint: Path) -> None:
    async with (
        gateway(checkpoint, ScriptedContext(SCRIPT), denoisers=0, min_denoisers=0) as running,
        running.client() as client,
    ):
        held = asyncio.create_task(collect(client))
        await until_wanted(running.http, "denoisers", 1)
        held.cancel()
        await until_pool(running.http, lambda pool: pool["gateways"]["load"] == 0)


async def test_ar_serves_meanwhile_if_the_operator_allows_it(checkpoint: Path) -> None:
    context = ScriptedContext(SCRIPT)
    settings = {"denoisers": 0, "ar_fallback": True}
    async with gateway(checkpoint, context, **settings) as running, running.client() as client:  # type: ignore[arg-type]
        events = [event async for event in client.generate([5], max_tokens=4)]
        assert isinstance(events[0], Accepted)
        assert any('mode "ar"' in warning for warning in events[0].warnings)
        async with httpx.AsyncClient(base_url=running.http) as http:
            answer = (await http.post("/v1/completions", json={"prompt": [5], "max_tokens": 4})).json()
        assert any('mode "ar"' in warning for warning in answer["warnings"])
        running.replicas.denoisers.append(replica("denoiser", "first", "127.0.0.1:1"))
        await until_pool(running.http, lambda pool: pool["denoisers"]["live"] == 1)
        events = [event async for event in client.generate([5], max_tokens=4)]
        assert isinstance(events[0], Accepted)
        assert events[0].warnings == ()
    modes = [params_from_pb(request.params).mode for request in context.opened]
    assert modes == [Mode.AR, Mode.AR, Mode.DIFFUSION]


async def test_a_gateway_stays_ready_while_its_only_denoiser_restarts(checkpoint: Path) -> None:
    """And what comes meanwhile is answered: else a restart of one replica would fail requests."""
    async with gateway(checkpoint, ScriptedContext(SCRIPT)) as running, running.client() as client:
        gone, running.replicas.denoisers = running.replicas.denoisers, []
        await until_pool(running.http, lambda pool: pool["denoisers"]["live"] == 0)
        held = asyncio.create_task(collect(client, max_tokens=8))
        async with httpx.AsyncClient(base_url=running.http) as http:
            assert (await http.get("/readyz")).status_code == 200
        running.replicas.denoisers = gone
        assert (await held)[0] == SCRIPT[:8]


async def test_a_drain_that_is_ordered_and_called_off(checkpoint: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Not ready at once; what comes nonetheless is served; drained when nothing runs; and ready again when it is called off."""
    go_on = asyncio.Event()

    async def before(number: int) -> None:
        if number == 1:
            await go_on.wait()

    context = ScriptedContext(SCRIPT, before)
    async with gateway(checkpoint, context) as running, running.client() as client:
        held = asyncio.create_task(collect(client, max_tokens=8))
        await until(lambda: context.running)
        (name,) = running.replicas.gateways
        running.replicas.orders[name] = True
        await until_ready_is(running.http, "this gateway is draining")
        late = asyncio.create_task(collect(client, max_tokens=8))
        await until(lambda: context.running == 2)
        go_on.set()
        assert [ids for ids, _ in await asyncio.gather(held, late)] == [SCRIPT[:8]] * 2
        await until_ready_is(running.http, "this gateway is drained")
        await until(lambda: running.replicas.gateways[name].draining and running.replicas.gateways[name].load == 0)
        running.replicas.orders[name] = False
        await until_ready_is(running.http, None)
        assert (await collect(client, max_tokens=8))[0] == SCRIPT[:8]
    assert capfd.readouterr().out.split() == ["drained", "serving", "drained"]
    assert running.replicas.gateways == {}


async def test_a_gateway_lingers_for_those_who_have_not_noticed(checkpoint: Path) -> None:
    async with gateway(checkpoint, ScriptedContext(SCRIPT), linger_s=2.0) as running, running.client() as client:
        running.stop.set()
        await until_ready_is(running.http, "this gateway is drained")
        assert (await collect(client, max_tokens=8))[0] == SCRIPT[:8]


def test_bounds_that_contradict_each_other_are_refused(checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match="min_denoisers: 5 is more than max_denoisers, 2"):
        GatewayConfig(min_denoisers=5, max_denoisers=2)
