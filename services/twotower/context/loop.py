"""The context tower's engine loop: one iteration after the other, on a thread of its own."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, NamedTuple

from opentelemetry.trace import Tracer

from twotower.engine.context_engine import ContextEngine
from twotower.engine.gathering import Gathering
from twotower.engine.scheduler import ContextScheduler
from twotower.engine.session import Session
from twotower.engine.thread import EngineThread
from twotower.engine.turns import Turns
from twotower.errors import Unavailable
from twotower.model.state import Delta
from twotower.tracing.recorder import NO_TRACER

log = logging.getLogger(__name__)

GATHER_S = 0.02
"""How long a commit waits, at most, for the other blocks that were finished in the same denoiser step."""
MERGE_S = 0.5
"""How long, at most, a few blocks wait on shared cores for more to be finished."""
CREDIT_S = 1.0
"""How long this tower may keep the cores that it shares with denoisers, whose batches are the fuller for it: the time that they
have had since, and so, in the long run, no longer than they."""

AfterChunk = Callable[[Session], None]
"""Called on the engine's thread, each time a chunk of the session's prompt is read."""


class Finish(NamedTuple):
    """How a worker finished a block."""

    worker_id: str
    forward: int
    """In which of its forwards."""
    together: int
    """Blocks that it finished in that one, and hands in one after the other."""


class Commit(NamedTuple):
    """What a commit came to."""

    delta: Delta
    number: int
    together: int
    """Sessions of the same worker that shared it."""


class _Work:
    """Something a session waits for."""

    def __init__(
        self,
        session: Session,
        block: list[int] | None = None,
        after_chunk: AfterChunk | None = None,
        before_last: Callable[[], None] | None = None,
        worker_id: str = "",
    ) -> None:
        self.session = session
        self.worker_id = worker_id
        self.block = block
        self.after_chunk = after_chunk
        self.before_last = before_last
        self.result: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    @property
    def tokens(self) -> int:
        """Tokens still to process."""
        return len(self.block) if self.block is not None else self.session.prefill_left


Outcome = tuple[_Work, Any]


class ContextLoop:
    """Turns the waits of many sessions into batched forwards. Nothing else touches the engine."""

    def __init__(
        self,
        engine: ContextEngine,
        thread: EngineThread,
        *,
        chunk: int,
        budget: int,
        turns: Turns | None = None,
        tracer: Tracer = NO_TRACER,
    ) -> None:
        """chunk: prompt tokens of a forward; budget: tokens of an iteration; turns: on cores shared with other towers."""
        self._engine = engine
        self._chunk = chunk
        self._thread = thread
        self.tracer = tracer
        self._scheduler: ContextScheduler[_Work] = ContextScheduler(budget, lambda work: work.tokens)
        self._turns = turns or Turns(None)
        self._credit_s = CREDIT_S
        self._gave_turn = float("-inf")
        """When others could have the cores again, by the event loop's clock."""
        self._wake = asyncio.Event()
        self._finished = Gathering(GATHER_S)
        """By worker and forward: blocks that were finished together."""
        self._commits = 0
        self._refining = 0

    @contextmanager
    def refining(self) -> Iterator[None]:
        """While a worker writes a block that this tower will have to commit."""
        self._refining += 1
        try:
            yield
        finally:
            self._refining -= 1
            self._wake.set()

    async def prefill(
        self, session: Session, after_chunk: AfterChunk | None = None, before_last: Callable[[], None] | None = None
    ) -> None:
        """Read the rest of the session's prompt. `before_last`: called in the event loop as the last chunk is begun."""
        if not session.prefill_left:
            if before_last is not None:
                before_last()
            return
        work = _Work(session, after_chunk=after_chunk, before_last=before_last)
        self._scheduler.add_prefill(work)
        await self._wait(work)

    def commit(self, session: Session, block: list[int], finish: Finish) -> Coroutine[Any, Any, Commit]:
        """Extend the session's state by a finished block that has come. It is in line when this returns, awaited or not yet."""
        work = _Work(session, block, worker_id=finish.worker_id)
        self._scheduler.add_commit(work)
        self.arrived(finish)
        return self._wait(work)

    def arrived(self, finish: Finish) -> None:
        """A block has come, to be committed or not. The commits of those finished with it wait for one another."""
        self._finished.arrive((finish.worker_id, finish.forward), finish.together)

    async def decode(self, session: Session) -> int:
        """The session's next AR token. Raises NonFiniteLogits."""
        work = _Work(session)
        self._scheduler.add_decode(work)
        token: int = await self._wait(work)
        return token

    async def settle(self) -> None:
        """Until the iteration under way, if any, is over: what it computes with may then be given to others."""
        await self._thread.settle()

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await self._wake.wait()
            await self._finished.complete()
            await self._merge()
            if not self._scheduler:
                self._wake.clear()
                continue
            async with self._turn() as until:
                while await self._iterate() and not self._few and asyncio.get_running_loop().time() < until:
                    await self._finished.complete()

    async def _iterate(self) -> bool:
        """One iteration; whether the next one should follow at once, before denoisers that share the cores go on.

        It should after commits and prompts, which give denoisers more to do at a time; AR tokens alternate with their steps.
        """
        plan = self._scheduler.plan()
        # A session may end at any await. Its slot can be another session's by the time its planned work would run,
        # so each part of the plan is looked at again in the moment in which it is handed to the thread; a slot is
        # given back only behind what the thread has begun (`settle`).
        if commits := _wanted(plan.commits):
            _deliver(await self._thread.run(self._commit, commits))
        if decodes := _wanted(plan.decodes):
            _deliver(await self._thread.run(self._decode, decodes))
        for work, tokens in plan.prefills:
            if not _wanted([work]):
                continue
            _deliver(await self._thread.run(self._prefill, work, tokens))
            if self._scheduler.urgent:
                break  # a worker or an AR client waits; what is left to read is planned again
        return bool(plan.commits or plan.prefills)

    @asynccontextmanager
    async def _turn(self) -> AsyncIterator[float]:
        """On shared cores, a turn; yields when it is to end, by the event loop's clock. One iteration is always due."""
        clock = asyncio.get_running_loop().time
        try:
            if self._turns.shared:
                await self._thread.run(self._turns.take)
            began = clock()
            self._credit_s = min(CREDIT_S, self._credit_s + began - self._gave_turn)
            yield began + self._credit_s
            self._gave_turn = clock()
            self._credit_s -= self._gave_turn - began
        finally:
            self._turns.give()

    @property
    def _few(self) -> bool:
        """Whether, on shared cores, all that waits are a few blocks, and denoisers are at many more."""
        waiting = self._scheduler.commits
        return self._turns.shared and self._scheduler.only_commits and 2 * waiting < self._refining

    async def _merge(self) -> None:
        """On shared cores, let sessions a few steps apart fall into step: both towers' batches are the fuller for it.

        The denoisers have the cores meanwhile, so that nothing is lost but these blocks' time.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(MERGE_S):
                while self._few:
                    self._wake.clear()
                    await self._wake.wait()
        self._wake.set()

    async def _wait(self, work: _Work) -> Any:
        self._wake.set()
        try:
            return await work.result
        finally:
            self._scheduler.discard(work)

    # On the engine's thread. A failure reaches those it concerns, and no one else.

    def _commit(self, works: list[_Work]) -> list[Outcome]:
        try:
            with self.tracer.start_as_current_span("commit", attributes={"batch": len(works)}):
                deltas = self._engine.commit([(work.session, work.block or []) for work in works])
        except Exception as error:
            return _all_failed(works, error)
        self._commits += 1
        together = Counter(work.worker_id for work in works)
        commits = [Commit(delta, self._commits, together[work.worker_id]) for work, delta in zip(works, deltas, strict=True)]
        return list(zip(works, commits, strict=True))

    def _decode(self, works: list[_Work]) -> list[Outcome]:
        try:
            with self.tracer.start_as_current_span("decode", attributes={"batch": len(works)}):
                tokens = self._engine.decode([work.session for work in works])
        except Exception as error:
            return _all_failed(works, error)
        return list(zip(works, tokens, strict=True))

    def _prefill(self, work: _Work, tokens: int) -> list[Outcome]:
        """Read at least so many tokens, in chunks that begin at multiples of their size: a prompt's state has the same
        bits however its chunks fall into iterations, and wherever a cached prefix ends."""
        session, read = work.session, 0
        try:
            while read < tokens and session.prefill_left:
                chunk = self._chunk - session.state.length % self._chunk
                if session.prefill_left <= chunk and work.before_last is not None:
                    work.result.get_loop().call_soon_threadsafe(work.before_last)
                    work.before_last = None
                with self.tracer.start_as_current_span("prefill", attributes={"tokens": min(chunk, session.prefill_left)}):
                    read += self._engine.prefill(session, chunk)
                if work.after_chunk is not None:
                    work.after_chunk(session)
        except Exception as error:
            return _all_failed([work], error)
        return [] if work.tokens else [(work, None)]


def _wanted(works: list[_Work]) -> list[_Work]:
    """Those whose sessions still wait for them."""
    return [work for work in works if not work.result.done()]


def _deliver(outcomes: list[Outcome]) -> None:
    for work, result in outcomes:
        if work.result.done():  # its session went away meanwhile
            continue
        if isinstance(result, Exception):
            work.result.set_exception(result)
        else:
            work.result.set_result(result)


def _all_failed(works: list[_Work], error: Exception) -> list[Outcome]:
    log.error("a forward of the context tower failed", exc_info=error)
    return [(work, Unavailable("the context tower failed on this request")) for work in works]
