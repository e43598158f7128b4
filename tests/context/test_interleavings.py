"""The scheduler as an adversary: contexts, workers and clients in any order of events that is possible.

Everything is real but the wires: the loops of both towers, the sessions, both ends of the links. Each runs only when the test
says so, one step at a time, so that Hypothesis finds, and shrinks, the order in which something goes wrong.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test

from tests.support.checkpoints import write_tiny_checkpoint
from tests.support.loops import CHUNK, TinyTowers
from twotower.broker.ready_queue import EntryId, ReadySession
from twotower.context import live as live_module
from twotower.context import sessions as sessions_module
from twotower.context.link import WorkerLink
from twotower.context.live import LiveSession, ShownBlock
from twotower.context.sessions import Sessions
from twotower.denoiser.worker import Worker
from twotower.engine.local import LocalEngine
from twotower.engine.progress import Progress
from twotower.internal.v1 import link_pb2
from twotower.request import FinishReason, GenerationParams, Mode, Priority
from twotower.tracing.recorder import NO_TRACER
from twotower.transport.frames import FrameInlet, FrameOutlet

SYSTEM = [(7 * i) % 90 + 4 for i in range(2 * CHUNK)]
PROMPTS = [[5], [*SYSTEM, 9, 8], [*SYSTEM, 4], [*SYSTEM[: CHUNK + 3], 70], SYSTEM]
PARAMS = [
    GenerationParams(max_tokens=40, gamma=0.3),
    GenerationParams(max_tokens=60, gamma=0.2, temperature=0.8, seed=3),
    GenerationParams(max_tokens=24, gamma=0.5, block_size=8, steps=8),
    GenerationParams(max_tokens=10, mode=Mode.AR),
    GenerationParams(max_tokens=30, mode=Mode.SPECULATIVE, steps=2),
    GenerationParams(max_tokens=24, mode=Mode.SPECULATIVE, steps=0, temperature=0.8, seed=5, block_size=8),
]
SLOTS = 3
WORKERS = 2


class Queue:
    """The ready queue, in memory: what `Sessions` and `Worker` need of it."""

    def __init__(self) -> None:
        self.entries: dict[str, ReadySession] = {}
        self._numbers = itertools.count()

    async def push(self, entry: ReadySession, priority: Priority = Priority.NORMAL, *, wait_s: float = 0) -> EntryId:
        number = str(next(self._numbers))
        self.entries[number] = entry
        await asyncio.sleep(0)
        return EntryId(priority, number)

    async def done(self, *entries: EntryId) -> None:
        await asyncio.sleep(0)
        for entry in entries:
            self.entries.pop(entry.number, None)

    async def contains(self, entry: EntryId) -> bool:
        return entry.number in self.entries

    def done_soon(self, entry: EntryId) -> None:
        self.entries.pop(entry.number, None)

    async def flush(self) -> None:
        pass


class Wire:
    """One call of `Link`: what either end writes is read by the other, in order, until one of them is cut off."""

    def __init__(self) -> None:
        self.to_context: asyncio.Queue[link_pb2.WorkerMessage | None] = asyncio.Queue()
        self.to_worker: asyncio.Queue[link_pb2.ContextMessage | None] = asyncio.Queue()

    async def write(self, message: link_pb2.WorkerMessage) -> None:
        self.to_context.put_nowait(link_pb2.WorkerMessage.FromString(message.SerializeToString()))

    async def read(self) -> Any:
        message = await self.to_worker.get()
        return grpc.aio.EOF if message is None else message  # type: ignore[attr-defined]  # absent from the stubs

    async def done_writing(self) -> None:
        self.to_context.put_nowait(None)

    async def context_write(self, message: link_pb2.ContextMessage) -> None:
        self.to_worker.put_nowait(link_pb2.ContextMessage.FromString(message.SerializeToString()))

    async def context_read(self) -> link_pb2.WorkerMessage | None:
        return await self.to_context.get()

    def cut(self) -> None:
        self.to_context.put_nowait(None)
        self.to_worker.put_nowait(None)


class Transports:
    """Frames only."""

    offer = link_pb2.TransportOffer()

    @staticmethod
    def attach(choice: object, address: str) -> FrameInlet:
        return FrameInlet()


class Client:
    """Reads what its session writes, unless it does not."""

    def __init__(self, world: World, live: LiveSession, expected: list[int]) -> None:
        self._world, self.live, self._expected = world, live, expected
        self.tokens: list[int] = []
        self.finished: FinishReason | None = None
        self.reads = asyncio.Event()
        self.reads.set()
        self.task = world.start(self._read())

    async def _read(self) -> None:
        try:
            while self.finished is None:
                await self.reads.wait()
                event = await self.live.next_event()
                self._world.sessions.has_read(self.live)
                if isinstance(event, Exception):
                    raise event
                if isinstance(event, ShownBlock):
                    self.tokens += event.tokens
                    assert self.tokens == self._expected[: len(self.tokens)], "a wrong text"
                elif isinstance(event, FinishReason):
                    self.finished = event
        finally:
            self._world.sessions.end(self.live)

    def check(self) -> None:
        assert self.finished is not None
        assert self.tokens == self._expected


class Machine:
    """A worker's process."""

    def __init__(self, world: World, name: str) -> None:
        self._world = world
        self.pool = world.towers.pool(SLOTS)
        self.wires: list[Wire] = []
        self.dead = False
        deliver = lambda results: world.mail.append(lambda: self._take(list(results)))  # noqa: E731
        self.loop = world.towers.denoiser_loop(deliver, self.pool)
        self.worker = Worker(
            world.towers.checkpoint,
            self.loop,
            world.queue,  # type: ignore[arg-type]  # the queue in memory
            name,
            self.pool,
            Transports(),  # type: ignore[arg-type]  # frames only
            Progress(60),
            dial=self._dial,
        )

    def _take(self, results: list[Any]) -> None:
        if not self.dead:
            self.worker.take(results)

    @asynccontextmanager
    async def _dial(self, address: str) -> AsyncIterator[Wire]:
        wire = Wire()
        self.wires.append(wire)
        self._world.start(self._world.serve(wire))
        try:
            yield wire
        finally:
            wire.cut()

    def die(self) -> None:
        self.dead = True
        for task in list(self.worker._running.values()):
            task.cancel()
        for wire in self.wires:
            wire.cut()


def _rounds(generated: int) -> list[int]:
    """How that many tokens may have been written elsewhere: by rounds, and by AR steps between them."""
    rounds: list[int] = []
    left = generated - 1
    for kept in itertools.cycle((3, 0, 1, 5)):
        if left < max(kept, 1):
            return rounds + [0] * left
        rounds.append(kept)
        left -= max(kept, 1)
    return rounds


class World:
    """A context, its clients, and workers that come and go."""

    def __init__(self, towers: TinyTowers, local: LocalEngine, expected: dict[tuple[int, int], list[int]]) -> None:
        self.towers, self._local, self._expected = towers, local, expected
        self.loop = asyncio.new_event_loop()
        self.tasks: set[asyncio.Task[Any]] = set()
        self.run(self._begin())

    async def _begin(self) -> None:
        self.queue = Queue()
        self.pool = self.towers.pool(SLOTS)
        self.mail: list[Callable[[], None]] = []
        """What loops have delivered, and the event loop has not taken yet."""
        deliver = lambda results: self.mail.append(lambda: self.sessions.take(list(results)))  # noqa: E731
        self.context = self.towers.context_loop(deliver, self.pool, budget=2 * CHUNK)
        self.sessions = Sessions(self.context, self.queue, None)  # type: ignore[arg-type]  # the queue in memory
        self.sessions.address = "context"
        self.machines = [Machine(self, f"worker-{i}") for i in range(WORKERS)]
        self.clients: list[Client] = []
        self._names = itertools.count()

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self.loop.run_until_complete(work)

    def start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = self.loop.create_task(work)
        self.tasks.add(task)
        return task

    def turns(self, count: int) -> None:
        """So many passes of the event loop, over what has been delivered by now."""

        async def wait() -> None:
            mail = self.mail.copy()
            self.mail.clear()
            for each in mail:
                each()
            for _ in range(count):
                await asyncio.sleep(0)

        self.run(wait())

    async def serve(self, wire: Wire) -> None:
        hello = await wire.context_read()
        if hello is None:
            return
        link = WorkerLink(
            self.sessions,
            hello.hello.worker_id,
            FrameOutlet(),
            self.towers.checkpoint.limits,
            NO_TRACER,
            silence_s=1e6,
            says_arrived=True,
        )
        await wire.context_write(link_pb2.ContextMessage(welcome=link_pb2.Welcome(silence_s=1e6, say_arrived=True)))
        await link.run(wire.context_read, wire.context_write)

    def open(self, prompt: int, params: int, moved: bool) -> None:
        """moved: the first half was written by another replica."""
        tokens, one = PROMPTS[prompt], PARAMS[params]
        key = (prompt, params)
        if key not in self._expected:
            alone = dataclasses.replace(one, mode=Mode.AR, steps=1) if one.mode is Mode.SPECULATIVE else one
            self._expected[key] = self._local.generate(tokens, alone).token_ids
        expected = self._expected[key]
        block = one.block_size if one.mode is Mode.DIFFUSION else 1
        done = (len(expected) // 2) // block * block if moved else 0
        known = [*tokens, *expected[:done]]
        last = known[-1] if done else None
        live = LiveSession(str(next(self._names)), len(known), one, generated=done, last_token=last)
        rounds = _rounds(done) if one.mode is Mode.SPECULATIVE else []

        async def begin() -> None:
            self.sessions.open(live, known, rounds)
            self.clients.append(Client(self, live, expected[done:]))

        self.run(begin())

    def pull(self, machine: Machine) -> None:
        async def attach() -> None:
            for number, ready in list(self.queue.entries.items()):
                if machine.worker.load < machine.worker.slots:
                    machine.worker._attach(EntryId(Priority.NORMAL, number), ready)
                    return

        self.run(attach())

    def to_the_end(self) -> None:
        self.start(self.sessions.watch_queue())  # a worker that had pulled a session may have died before it said so
        for _ in range(3000):
            if all(client.task.done() for client in self.clients):
                break
            self.context.iterate()
            self.turns(3)
            for machine in self.machines:
                self.pull(machine)
                self.turns(3)
                machine.loop.iterate()
                self.turns(3)
        for _ in range(10):
            self.context.iterate()
            self.turns(10)
            for machine in self.machines:
                machine.loop.iterate()
        self.turns(20)

    def close(self) -> None:
        async def cancel() -> None:
            for machine in self.machines:
                machine.die()
            for task in self.tasks:
                task.cancel()
            await asyncio.gather(*self.tasks, return_exceptions=True)
            await asyncio.sleep(0.01)

        self.run(cancel())
        self.loop.close()


class Interleavings(RuleBasedStateMachine):
    """What can happen, in any order."""

    make: Callable[[], World]

    def __init__(self) -> None:
        super().__init__()
        self.world = type(self).make()

    @initialize(alike=st.integers(0, SLOTS), params=st.integers(0, len(PARAMS) - 1), rounds=st.integers(0, 6))
    def begin(self, alike: int, params: int, rounds: int) -> None:
        """Sessions in step, on one worker."""
        for prompt in range(alike):
            self.world.open(prompt, params, moved=False)
        self.go_on(3)
        for _ in range(alike):
            self.world.pull(self.world.machines[0])
        self.go_on(rounds)

    @rule(prompt=st.integers(0, len(PROMPTS) - 1), params=st.integers(0, len(PARAMS) - 1), moved=st.booleans())
    def open(self, prompt: int, params: int, moved: bool) -> None:
        if len(self.world.clients) < 8:
            self.world.open(prompt, params, moved)

    @precondition(lambda self: self.world.clients)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        """A client goes, wherever its session is."""
        client = data.draw(st.sampled_from(self.world.clients))
        client.task.cancel()
        self.world.clients.remove(client)
        self.world.turns(data.draw(st.integers(0, 3)))

    @precondition(lambda self: self.world.clients)
    @rule(data=st.data(), reads=st.booleans())
    def read(self, data: st.DataObject, reads: bool) -> None:
        """A client stops to read, or goes on."""
        client = data.draw(st.sampled_from(self.world.clients))
        client.reads.set() if reads else client.reads.clear()

    @rule(worker=st.integers(0, WORKERS - 1))
    def pull(self, worker: int) -> None:
        self.world.pull(self.world.machines[worker])

    @rule(count=st.integers(1, 4))
    def iterate_context(self, count: int) -> None:
        for _ in range(count):
            self.world.context.iterate()

    @rule(worker=st.integers(0, WORKERS - 1), count=st.integers(1, 4))
    def iterate_worker(self, worker: int, count: int) -> None:
        for _ in range(count):
            self.world.machines[worker].loop.iterate()

    @rule(count=st.integers(1, 12))
    def let_messages_travel(self, count: int) -> None:
        self.world.turns(count)

    @rule(count=st.integers(1, 5))
    def go_on(self, count: int) -> None:
        """Everybody does some work."""
        for _ in range(count):
            self.world.context.iterate()
            self.world.turns(4)
            for machine in self.world.machines:
                machine.loop.iterate()
                self.world.turns(4)

    @rule(worker=st.integers(0, WORKERS - 1))
    def kill(self, worker: int) -> None:
        """A worker dies, and another one takes its place. What it had sent may still arrive."""
        self.world.run(self._replace(worker))

    async def _replace(self, worker: int) -> None:
        self.world.machines[worker].die()
        self.world.machines[worker] = Machine(self.world, f"worker-{worker}")

    @rule(worker=st.integers(0, WORKERS - 1))
    def hand_back(self, worker: int) -> None:
        """A worker lets go of what it is not at, as when it drains."""

        async def work() -> None:
            for link in self.world.machines[worker].worker._links.values():
                link.hand_back()

        self.world.run(work())

    @rule(worker=st.integers(0, WORKERS - 1), turns=st.integers(0, 6), dies=st.booleans())
    def take_over(self, worker: int, turns: int, dies: bool) -> None:
        """What one worker hands back, or leaves behind, another one pulls at once."""
        self.kill(worker) if dies else self.hand_back(worker)
        self.world.turns(turns)
        for _ in range(SLOTS):
            self.world.pull(self.world.machines[worker - 1])
        self.world.turns(turns)

    @invariant()
    def slots_are_those_of_residents(self) -> None:
        context = self.world.context
        assert self.world.pool.used_slots == len(context._residents)
        places = [resident.session.state.place for resident in context._residents.values()]
        assert len({place.slot for place in places if place is not None}) == len(places)
        for machine in self.world.machines:
            assert machine.pool.used_slots == len(machine.loop._residents)

    @invariant()
    def no_text_is_wrong(self) -> None:
        for client in self.world.clients:
            if client.task.done():
                client.task.result()

    def teardown(self) -> None:
        world = self.world
        try:
            for client in world.clients:
                client.reads.set()
            world.to_the_end()
            for client in world.clients:
                assert client.task.done(), "a session does not end"
                client.task.result()
                client.check()
            assert not len(world.sessions)
            assert not world.context._residents
            assert world.pool.used_slots == world.pool.used_pages == 0
            assert world.context.refining == 0
            assert world.context.outbound.arrived
            assert not world.queue.entries
            for machine in world.machines:
                assert machine.worker.load == 0
                assert machine.pool.used_slots == machine.pool.used_pages == 0
        finally:
            world.close()


def _explore(path: Path, monkeypatch: pytest.MonkeyPatch, examples: int, steps: int, *, random: bool) -> None:
    monkeypatch.setattr(sessions_module, "MAX_FAILURES", 1_000_000)
    monkeypatch.setattr(sessions_module, "LOST_ENTRY_S", 0.01)
    monkeypatch.setattr(live_module, "MAX_UNREAD", 2)
    monkeypatch.setattr(live_module, "RESUME_UNREAD", 1)
    towers, local = TinyTowers(path), LocalEngine(path, threads=1, prefill_chunk=CHUNK)
    expected: dict[tuple[int, int], list[int]] = {}
    Interleavings.make = lambda *_: World(towers, local, expected)
    checks: Sequence[HealthCheck] = list(HealthCheck)
    run_state_machine_as_test(
        Interleavings,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            derandomize=not random,
            suppress_health_check=checks,
            database=None,
        ),
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_tiny_checkpoint(tmp_path / "tiny")


def test_in_any_order_every_surviving_session_gets_its_own_text(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _explore(path, monkeypatch, examples=30, steps=30, random=False)


@pytest.mark.slow
def test_in_any_order_at_length(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _explore(path, monkeypatch, examples=400, steps=80, random=True)


def test_a_copy_made_for_a_worker_that_let_go_is_not_the_next_ones(path: Path) -> None:
    """It is on its way to the event loop while the session changes hands; the next worker gets its own, and only that."""
    towers, local = TinyTowers(path), LocalEngine(path, threads=1, prefill_chunk=CHUNK)
    world = World(towers, local, {})
    try:
        first, second = world.machines

        def without_results(passes: int = 8) -> None:
            for _ in range(passes):
                world.run(asyncio.sleep(0))

        world.open(0, 0, moved=False)
        world.context.iterate()
        world.turns(4)
        world.pull(first)
        without_results()
        world.context.iterate()  # copies the state; nobody has heard of it yet
        (link,) = first.worker._links.values()
        assert world.mail

        async def hand_back() -> None:
            link.hand_back()

        world.run(hand_back())
        without_results()
        world.pull(second)
        without_results()
        world.turns(8)  # now the first worker's copy is delivered
        second.loop.iterate()
        assert second.pool.used_slots == 0
        world.to_the_end()
        assert second.pool.used_slots == first.pool.used_slots == 0
        for client in world.clients:
            client.check()
    finally:
        world.close()
