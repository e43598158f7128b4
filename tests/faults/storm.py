"""A stack, a load, strikes: one scenario from its calm to what it leaves behind."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from redis.asyncio import Redis
from redis.exceptions import RedisError

from tests.faults.asks import Answer, Ask
from tests.faults.clients import Clients, Failed, Refused
from tests.faults.remains import Remains, look
from tests.faults.strikes import Strike
from tests.faults.tally import Tally, reason_of
from tests.support.processes import Up, environment
from twotower.broker.keys import PREFIX
from twotower.errors import BrokerUnavailable
from twotower.service.config import REDIS_VARIABLE
from twotower.tasks import end_tasks

Say = Callable[[str], None]

FACES = ("grpc", "sse", "http")
PATIENCE_S = 90.0
"""How long a client goes on asking again after refusals."""
AGAIN_S = 0.05
"""What a client waits after a refusal."""
LONG_TOKENS = 480
"""Of a text that is under way for long enough that all others begin meanwhile."""
LEAVES_AFTER_S = 0.3
"""A client that leaves does so within this time."""
SETTLE_S = 45.0
"""How long a stack may take, after the last strike, to be whole again and to hold nothing."""


@dataclass(frozen=True, slots=True)
class Scenario:
    """What is asked, by how many, and what goes wrong meanwhile."""

    name: str
    says: str
    """What it shows, in a sentence."""
    asks: Sequence[Ask]
    options: Sequence[object] = ("--contexts", 2, "--denoisers", 2)
    """Of `twotower up`."""
    clients: int = 12
    leave: float = 0.0
    """The share of requests whose client leaves early."""
    strike: Strike | None = None
    hung_s: float = 120.0
    """A request that takes this long counts as failed: it hangs."""
    room: int = 0
    """Sessions that both towers hold at once; as many must still fit afterwards. 0: not tried (there must be one of each)."""
    must_wait: bool = False
    """Requests must wait for what is away: a refusal counts as a failure."""


@dataclass(slots=True)
class Report:
    """What came of a scenario."""

    scenario: str
    phases: dict[str, Tally] = field(default_factory=dict)
    strikes: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    """What remained that should not have."""
    tracebacks: int = 0
    """In the logs of all services."""
    alive: bool = True
    """Whether the stack still ran at the end."""
    exit_status: int | None = None
    """Of its drain."""

    @property
    def problems(self) -> list[str]:
        """Everything that must not be, in short; empty if all was well."""
        said = [] if self.alive else ["the stack ended"]
        for phase, tally in self.phases.items():
            if tally.different:
                said.append(f"{phase}: {tally.different.total()} texts differ")
            if tally.failed:
                said.append(f"{phase}: {tally.failed.total()} requests failed")
            if not tally.compared:
                said.append(f"{phase}: nothing was compared")
        if self.exit_status not in (0, None):
            said.append(f"the drain ended with status {self.exit_status}")
        return said + [f"left over: {item}" for item in self.left]

    def lines(self) -> list[str]:
        """The whole report in words."""
        said = [f"== {self.scenario}: {'; '.join(self.problems) or 'all well'}"]
        for phase, tally in self.phases.items():
            said += tally.lines(phase)
        said.append(f"strikes: {len(self.strikes)}; tracebacks in the logs: {self.tracebacks}; exit status {self.exit_status}")
        return said


class Storm:
    """One scenario on a stack that runs. `calm()` first, then `run()`, then `after()`."""

    def __init__(self, scenario: Scenario, up: Up, say: Say) -> None:
        self._scenario = scenario
        self._up = up
        self._say = say
        self._clients = Clients(up.grpc, up.http)
        self._answers: list[Answer] = []
        self._redis_url = environment(up.child("context"))[REDIS_VARIABLE]
        self._identity = ""
        self._calm = Remains()
        self.report = Report(scenario.name)

    async def close(self) -> None:
        """Close the clients."""
        await self._clients.close()

    async def calm(self) -> None:
        """Ask for everything alone, then once together, with nothing wrong; look at what the stack holds afterwards."""
        for ask in self._scenario.asks:
            self._answers.append(await self._clients.ask(ask, "http"))
        tally = self.report.phases["calm, together"] = Tally()
        await self._each_once(tally)
        self._identity = await _identity(self._redis_url)
        self._calm = await self._settled(None)

    async def run(self, seconds: float) -> None:
        """Load and strikes for so many seconds; then every request that runs comes to its end."""
        tally = self.report.phases["storm"] = Tally()
        strike = self._scenario.strike
        striking = [] if strike is None else [asyncio.ensure_future(strike(self._up, self._struck))]
        end = time.monotonic() + seconds
        try:
            async with asyncio.TaskGroup() as group:
                for number in range(self._scenario.clients):
                    group.create_task(self._client(number, end, tally))
                await asyncio.sleep(seconds)
                await end_tasks(*striking)
        finally:
            await end_tasks(*striking)

    async def after(self) -> None:
        """All once more, in the calm that follows, and what is left then."""
        self.report.alive = self._up.process.poll() is None
        if self.report.alive:
            await self._settled(self._calm)
            tally = self.report.phases["afterwards"] = Tally()
            await self._each_once(tally)
            self.report.left = (await self._settled(self._calm)).beyond(self._calm) + await self._lost_room()
        self.report.tracebacks = sum("Traceback" in line for line in self._up.log)

    def _struck(self, what: str) -> None:
        self.report.strikes.append(what)
        self._say(what)

    async def _each_once(self, tally: Tally) -> None:
        limit = asyncio.Semaphore(self._scenario.clients)

        async def one(index: int) -> None:
            async with limit:
                await self._judged(index, FACES[index % len(FACES)], tally)

        await asyncio.gather(*map(one, range(len(self._scenario.asks))))

    async def _client(self, number: int, end: float, tally: Tally) -> None:
        rng = random.Random(f"{self._scenario.name}:{number}")
        while time.monotonic() < end and self._up.process.poll() is None:
            index, face = rng.randrange(len(self._scenario.asks)), rng.choice(FACES)
            if rng.random() < self._scenario.leave:
                await self._left(index, face, rng.uniform(0, LEAVES_AFTER_S), tally)
            else:
                await self._judged(index, face, tally)

    async def _left(self, index: int, face: str, after_s: float, tally: Tally) -> None:
        """Ask, and leave; one that was answered or refused by then is not counted."""
        try:
            async with asyncio.timeout(after_s):
                await self._clients.ask(self._scenario.asks[index], face)
        except TimeoutError:
            tally.left += 1
        except Refused:
            pass
        except Failed as failed:
            tally.failed[reason_of(str(failed))] += 1

    async def _judged(self, index: int, face: str, tally: Tally) -> None:
        """Ask until there is an answer or a failure, and count that."""
        ask, give_up = self._scenario.asks[index], time.monotonic() + PATIENCE_S
        while True:
            asked = time.monotonic()
            try:
                async with asyncio.timeout(self._scenario.hung_s):
                    tally.answer(ask, await self._clients.ask(ask, face), self._answers[index])
                tally.seconds.append(time.monotonic() - asked)
                return
            except Refused as refused:
                counted = tally.failed if self._scenario.must_wait else tally.refused
                counted[reason_of(str(refused))] += 1
                if time.monotonic() >= give_up or self._up.process.poll() is not None:
                    tally.failed[f"refused for {PATIENCE_S:.0f} s"] += 1
                    return
                await asyncio.sleep(AGAIN_S)
            except Failed as failed:
                tally.failed[reason_of(str(failed))] += 1
                await asyncio.sleep(AGAIN_S)
                return
            except TimeoutError:
                tally.failed[f"{face}: no end within {self._scenario.hung_s:.0f} s"] += 1
                return

    async def _lost_room(self) -> list[str]:
        """Ask for as many long texts as fit: one that begins only when another has ended waited for a slot that is lost."""
        begun, ended = 0, asyncio.Event()

        def began() -> None:
            nonlocal begun
            begun += not ended.is_set()

        async def one(index: int) -> None:
            ask = self._scenario.asks[index % len(self._scenario.asks)]
            await self._clients.watched(Ask(ask.prompt, {"max_tokens": LONG_TOKENS, "ignore_eos": True}), began)
            ended.set()

        try:
            await asyncio.gather(*map(one, range(self._scenario.room)))
        except (Refused, Failed) as error:
            return [f"room: {error}"]
        lost = self._scenario.room - begun
        return [f"slots: {lost} of {self._scenario.room} are lost"] if lost else []

    async def _settled(self, calm: Remains | None) -> Remains:
        """What the stack holds, once that is nothing beyond `calm`; or what it is then, after a while."""
        give_up = time.monotonic() + SETTLE_S
        while True:
            try:
                found = await look(self._up, self._redis_url, self._identity)
                beyond = found.beyond(found if calm is None else calm)
                whole = all(found.announced[kind] == found.processes[kind] for kind in found.announced)
                if (not beyond and whole) or time.monotonic() >= give_up:
                    return found
            except (BrokerUnavailable, RedisError, OSError):
                if time.monotonic() >= give_up:
                    raise
            await asyncio.sleep(0.5)


async def weather(scenario: Scenario, up: Up, seconds: float, say: Say) -> Report:
    """Run a scenario on a stack, from the calm to what is left. Does not end the stack."""
    async with _storm(scenario, up, say) as storm:
        say(f"{scenario.name}: {len(scenario.asks)} answers in the calm ...")
        await storm.calm()
        say(f"{scenario.name}: {seconds:g} s of storm ...")
        await storm.run(seconds)
        say(f"{scenario.name}: afterwards ...")
        await storm.after()
        return storm.report


@asynccontextmanager
async def _storm(scenario: Scenario, up: Up, say: Say) -> AsyncIterator[Storm]:
    storm = Storm(scenario, up, say)
    try:
        yield storm
    finally:
        await storm.close()


async def _identity(redis_url: str) -> str:
    """Of the one checkpoint whose replicas are announced."""
    redis = Redis.from_url(redis_url, decode_responses=True)
    try:
        async for key in redis.scan_iter(match=f"{PREFIX}:*:replica:context:*"):
            identity: str = json.loads(await redis.get(key) or "{}")["identity"]
            return identity
    finally:
        await redis.aclose()
    raise AssertionError("no context is announced")
