"""`twotower drain` against replicas that obey, and one that does not."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from redis.asyncio import Redis

from tests.support.processes import run_cli
from tests.support.redis_server import embedded_redis
from twotower.broker.connection import connect
from twotower.broker.heartbeat import heartbeat
from twotower.broker.registry import Registry, Replica
from twotower.service.drain import Drain
from twotower.tasks import end_tasks


class Service:
    """Nothing but a drain and a load."""

    def __init__(self, name: str, load: int) -> None:
        self.replica = Replica("denoiser", name, f"{name}:1", "x", load, 8)
        self.lines: list[str] = []
        self.serving = True
        self.drain = Drain(
            begin=lambda: None,
            call_off=lambda: None,
            load=lambda: self.replica.load,
            set_serving=self._set_serving,
            say=self.lines.append,
        )

    async def _set_serving(self, serving: bool) -> None:
        self.serving = serving

    def describe(self) -> Replica:
        return dataclasses.replace(self.replica, draining=self.drain.draining)


@asynccontextmanager
async def running(redis: Redis, *services: Service) -> AsyncIterator[None]:
    registry = Registry(redis, "x")
    tasks = [asyncio.create_task(heartbeat(registry, service.describe, service.drain.obey)) for service in services]
    await asyncio.sleep(0.1)
    try:
        yield
    finally:
        await end_tasks(*tasks)


async def test_drain_list_and_call_off() -> None:
    async with embedded_redis() as server:
        redis = await connect(server.url)
        idle, busy = Service("idle", 0), Service("busy", 3)

        async def cli(*words: str) -> tuple[int, str, str]:
            done = await asyncio.to_thread(run_cli, "drain", "--redis", server.url, *words)
            return done.returncode, done.stdout, done.stderr

        async with running(redis, idle, busy):
            assert await cli("idle") == (0, "drained idle\n", "")
            assert (idle.lines, idle.serving) == (["drained"], False)
            status, out, err = await cli("busy:1", "--wait", "1.5")
            assert (status, out, err) == (1, "", "error: busy: not drained within 1.5 s\n")
            _, out, _ = await cli()
            assert [line.split()[:4] for line in out.splitlines()] == [
                ["denoiser", "busy", "busy:1", "draining"],
                ["denoiser", "idle", "idle:1", "drained"],
            ]
            status, out, _ = await cli("busy", "idle", "--off")
            assert (status, sorted(out.splitlines())) == (0, ["serving busy", "serving idle"])
            assert (idle.lines, idle.serving) == (["drained", "serving"], True)
            assert (busy.lines, busy.serving) == (["serving"], True)
            status, out, err = await cli("nobody")
            assert (status, out) == (1, "")
            assert err == "error: name: no replica 'nobody' is live; these are: busy, idle\n"
        await redis.aclose()


async def test_a_drain_before_the_end_is_not_called_off() -> None:
    service = Service("one", 1)
    await service.drain.begin()
    assert not service.serving
    await service.drain.obey(False)
    assert (service.serving, service.drain.draining, service.lines) == (False, True, [])
    service.replica = dataclasses.replace(service.replica, load=0)
    await service.drain.obey(None)
    await service.drain.report()
    assert service.lines == ["drained"]
