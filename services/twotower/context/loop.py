"""The context tower's engine loop: one iteration after the other, on a thread of its own."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from opentelemetry.trace import Tracer

from twotower.engine.context_engine import ContextEngine
from twotower.engine.scheduler import ContextScheduler
from twotower.engine.session import Session
from twotower.engine.thread import EngineThread
from twotower.errors import Unavailable
from twotower.model.state import Delta
from twotower.tracing.recorder import NO_TRACER

log = logging.getLogger(__name__)

GATHER_S = 0.002
"""How long an idle tower waits, after a block has come, for others of the same denoiser step to share its commit."""

AfterChunk = Callable[[Session], None]
"""Called on the engine's thread, each time a chunk of the session's prompt is read."""


class _Work:
    """Something a session waits for."""

    def __init__(
        self,
        session: Session,
        block: list[int] | None = None,
        after_chunk: AfterChunk | None = None,
        before_last: Callable[[], None] | None = None,
    ) -> None:
        self.session = session
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
        self, engine: ContextEngine, thread: EngineThread, *, chunk: int, budget: int, tracer: Tracer = NO_TRACER
    ) -> None:
        """chunk: prompt tokens of a forward; budget: tokens of an iteration."""
        self._engine = engine
        self._chunk = chunk
        self._thread = thread
        self.tracer = tracer
        self._scheduler: ContextScheduler[_Work] = ContextScheduler(budget, lambda work: work.tokens)
        self._wake = asyncio.Event()
        self._refining = 0

    @contextmanager
    def refining(self) -> Iterator[None]:
        """While a worker writes a block that this tower will have to commit."""
        self._refining += 1
        try:
            yield
        finally:
            self._refining -= 1

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

    async def commit(self, session: Session, block: list[int]) -> Delta:
        """Extend the session's state by a finished block."""
        work = _Work(session, block)
        self._scheduler.add_commit(work)
        delta: Delta = await self._wait(work)
        return delta

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
            await self._gather()
            plan = self._scheduler.plan()
            if not plan:
                self._wake.clear()
                continue
            if plan.commits:
                _deliver(await self._thread.run(self._commit, plan.commits))
            if plan.decodes:
                _deliver(await self._thread.run(self._decode, plan.decodes))
            for work, tokens in plan.prefills:
                _deliver(await self._thread.run(self._prefill, work, tokens))
                if self._scheduler.urgent:
                    break  # a worker or an AR client waits; what is left to read is planned again

    async def _gather(self) -> None:
        """Let blocks of one denoiser step, whose messages come one after the other, share a forward."""
        while self._refining and (waiting := self._scheduler.commits) and not self._scheduler.prefilling:
            self._wake.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(GATHER_S):
                    await self._wake.wait()
            self._wake.set()
            if self._scheduler.commits == waiting:
                return

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
        return list(zip(works, deltas, strict=True))

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
