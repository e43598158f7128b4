"""The scheduler as an adversary: contexts, workers and clients in any order of events that is possible.

Everything is real but the wires: the loops of both towers, the sessions, both ends of the links. Each runs only when the test
says so, one step at a time, so that Hypothesis finds, and shrinks, the order in which something goes wrong.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test

from tests.support.checkpoints import write_tiny_checkpoint
from tests.support.loops import CHUNK, FixedTimes, TinyTowers
from twotower.broker.ready_queue import EntryId, ReadySession
from twotower.context import live as live_module
from twotower.context import loop as loop_module
from twotower.context import sessions as sessions_module
from twotower.context.link import WorkerLink
from twotower.context.live import LiveSession, ShownBlock
from twotower.context.sessions import Sessions
from twotower.denoiser.worker import Worker
from twotower.engine import effort as effort_module
from twotower.engine import isolation as isolation_module
from twotower.engine.local import LocalEngine
from twotower.engine.progress import Progress
from twotower.engine.refinement import Refinement
from twotower.errors import BrokerUnavailable, NonFiniteLogits, Unavailable
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
    GenerationParams(max_tokens=50, mode=Mode.SPECULATIVE, steps=1, eos_token_ids=tuple(range(0, 90, 9)), logprobs=1),
]
FORWARDS = ("read", "extend", "_draw", "_verify", "commit_together", "step", "not finite")
"""What can fail in an engine: it raises once, after a part of its work."""
SLOTS = 3
WORKERS = 2


class Queue:
    """The ready queue, in memory: what `Sessions` and `Worker` need of it."""

    def __init__(self) -> None:
        self.entries: dict[str, ReadySession] = {}
        self.taken: dict[str, ReadySession] = {}
        """What workers have taken off: it may be delivered again."""
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
        if (taken := self.entries.pop(entry.number, None)) is not None:
            self.taken[entry.number] = taken

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
    """Reads what its session writes, unless it does not. When a context fails, it opens the session again."""

    def __init__(self, world: World, prompt: list[int], params: GenerationParams, expected: list[int], done: int) -> None:
        """done: tokens that another replica has written."""
        self._world, self._prompt, self._params, self._expected = world, prompt, params, expected
        self.tokens = expected[:done]
        self._rounds = _rounds(done) if params.mode is Mode.SPECULATIVE else []
        self.finished: FinishReason | None = None
        self.reads = asyncio.Event()
        self.reads.set()
        self.task = world.start(self._read())

    async def _read(self) -> None:
        while self.finished is None:
            try:
                await self._attempt()
            except Unavailable:
                if len(self.tokens) == len(self._expected):  # a gateway knows that it is over
                    return

    async def _attempt(self) -> None:
        live = self._world.session(self._prompt, self.tokens, self._params, self._rounds)
        try:
            while self.finished is None:
                await self.reads.wait()
                event = await live.next_event()
                self._world.sessions.has_read(live)
                if isinstance(event, Exception):
                    raise event
                if isinstance(event, ShownBlock):
                    self._take(event)
                elif isinstance(event, FinishReason):
                    self.finished = event
        finally:
            self._world.sessions.end(live)

    def _take(self, block: ShownBlock) -> None:
        self.tokens += block.tokens
        assert self.tokens == self._expected[: len(self.tokens)], "a wrong text"
        assert len(block.logprobs) == (0 if self._params.logprobs is None else len(block.tokens))
        if block.use.context_forwards:
            self._rounds.append(len(block.tokens) if block.use.drafted else 0)

    def check(self) -> None:
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
        self._step, self.loop.engine.step = self.loop.engine.step, self._step_or_fail  # type: ignore[method-assign]
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

    def _step_or_fail(self, blocks: Iterable[Refinement]) -> None:
        blocks = list(blocks)
        self._world.fail_if("step")
        self._step(blocks)
        drafts = [block for block in blocks if block.draft]  # a block that is no draft would end its request
        if drafts and self._world.fault == "not finite":
            self._world.fault = None
            drafts[0].error = NonFiniteLogits("the denoiser's logits are not finite")

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
        self.context.times = FixedTimes(
            token=1.0, commit=1.0, step=0.4
        )  # random drafts earn little: sessions rest, and come back
        self.fault: str | None = None
        """One of `FORWARDS`, which fails when it runs next."""
        for name in ("read", "extend", "_draw", "_verify", "commit_together"):
            self._let_fail(name, changes_states=name in ("read", "extend"))
        self.sessions = Sessions(self.context, self.queue, None)  # type: ignore[arg-type]  # the queue in memory
        self.sessions.address = "context"
        self.machines = [Machine(self, f"worker-{i}") for i in range(WORKERS)]
        self.clients: list[Client] = []
        self._names = itertools.count()

    def _let_fail(self, name: str, *, changes_states: bool) -> None:
        engine = self.context._engine
        real = getattr(engine, name)

        def run_or_fail(*args: Any, **kwargs: Any) -> Any:
            if changes_states:
                result = real(*args, **kwargs)
                self.fail_if(name)
                return result
            self.fail_if(name)
            return real(*args, **kwargs)

        setattr(engine, name, run_or_fail)

    def fail_if(self, name: str) -> None:
        if self.fault == name:
            self.fault = None
            raise RuntimeError(f"{name} fails")

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

        async def begin() -> None:
            self.clients.append(Client(self, tokens, one, expected, done))
            await asyncio.sleep(0)

        self.run(begin())

    def session(self, prompt: list[int], written: list[int], params: GenerationParams, rounds: list[int]) -> LiveSession:
        """A new session that goes on behind `written`."""
        known, last = [*prompt, *written], written[-1] if written else None
        live = LiveSession(
            str(next(self._names)), len(known), params, generated=len(written), last_token=last, times=self.context.times
        )
        self.sessions.open(live, known, list(rounds))
        return live

    def pull(self, machine: Machine) -> None:
        async def attach() -> None:
            for number, ready in list(self.queue.entries.items()):
                if machine.worker.load < machine.worker.slots:
                    machine.worker._attach(EntryId(Priority.NORMAL, number), ready)
                    return

        self.run(attach())

    def deliver_again(self, machine: Machine, number: str) -> None:
        async def attach() -> None:
            machine.worker._attach(EntryId(Priority.NORMAL, number), self.queue.taken[number])

        if machine.worker.load < machine.worker.slots:
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

    @precondition(lambda self: self.world.queue.taken)
    @rule(worker=st.integers(0, WORKERS - 1), data=st.data())
    def deliver_again(self, worker: int, data: st.DataObject) -> None:
        """An entry that was taken off the queue comes once more, as when its first taker did not say that it had it."""
        numbers = list(self.world.queue.taken)[-2 * SLOTS :]
        self.world.deliver_again(self.world.machines[worker], data.draw(st.sampled_from(numbers)))

    @rule(name=st.sampled_from(FORWARDS))
    def fail(self, name: str) -> None:
        """A forward fails, when it runs next."""
        self.world.fault = name

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
    monkeypatch.setattr(isolation_module, "MAX_FAILURES", 1_000_000)
    monkeypatch.setattr(loop_module, "MAX_COPIES", 1)
    monkeypatch.setattr(effort_module, "REST", 2)
    monkeypatch.setattr(effort_module, "MAX_REST", 4)
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


def test_an_entry_that_is_delivered_again_gives_its_session_to_nobody(path: Path) -> None:
    """Its session has left the worker that came with it, and waits for none."""
    towers, local = TinyTowers(path), LocalEngine(path, threads=1, prefill_chunk=CHUNK)
    world = World(towers, local, {})
    try:
        first, second = world.machines
        world.open(0, 4, moved=False)
        for _ in range(2):
            world.context.iterate()
            world.turns(4)
        world.pull(first)
        world.turns(8)
        world.context.iterate()
        world.turns(8)
        world.fault = "not finite"
        first.loop.iterate()
        world.turns(8)
        (live,) = world.sessions
        assert live.link is None
        assert not live.wants_worker
        (number,) = world.queue.taken
        world.deliver_again(second, number)
        world.turns(8)
        assert live.link is None
        second.loop.iterate()
        world.turns(8)
        assert second.worker.load == 0
        world.to_the_end()
        world.clients[0].check()
    finally:
        world.close()


@pytest.mark.parametrize("error", [BrokerUnavailable("Redis does not answer"), RuntimeError("no idea")])
def test_a_session_that_a_worker_has_does_not_end_because_redis_never_answered(
    path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """The entry was there, and pulled, but the word that it is there was lost."""
    monkeypatch.setattr(sessions_module, "BROKER_WAIT_S", 0.0)
    towers, local = TinyTowers(path), LocalEngine(path, threads=1, prefill_chunk=CHUNK)
    world = World(towers, local, {})
    try:
        answered, push = asyncio.Event(), world.queue.push

        async def push_without_an_answer(*args: Any, **kwargs: Any) -> EntryId:
            await push(*args, **kwargs)
            await answered.wait()
            raise error

        world.queue.push = push_without_an_answer  # type: ignore[method-assign]
        world.open(0, 0, moved=False)
        world.context.iterate()
        world.turns(4)
        world.pull(world.machines[0])
        world.turns(8)
        (live,) = world.sessions
        assert live.link is not None
        answered.set()
        world.turns(4)
        assert live.link is not None
        assert (live.over, live.failures) == (False, 0)
        world.to_the_end()
        world.clients[0].check()
    finally:
        world.close()
