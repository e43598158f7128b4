"""The context's gRPC face: `Open` for gateways, `Attach` for denoiser workers."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from contextlib import aclosing
from typing import Any

from twotower.broker.ready_queue import EntryId, ReadyQueue, ReadySession
from twotower.context.loop import Commit, ContextLoop, Finish
from twotower.context.prefixes import PrefixCache
from twotower.context.sessions import LiveSession, SessionTable
from twotower.engine.admission import Admission
from twotower.engine.context_engine import ContextEngine
from twotower.engine.session import room_for
from twotower.errors import (
    BrokerUnavailable,
    Incompatible,
    InvalidArgument,
    NonFiniteLogits,
    SessionNotFound,
    TwoTowerError,
    Unavailable,
)
from twotower.model.checkpoint import Checkpoint
from twotower.request import FinishReason, Mode, Priority, TokenLogprob, check_request
from twotower.tracing.recorder import transfer
from twotower.transport.ends import ContextTransports
from twotower.transport.interface import Outlet
from twotower.v1 import context_pb2, context_pb2_grpc
from twotower.wire.handshake import check_hello
from twotower.wire.logprobs import check_logprobs, logprobs_from_pb, logprobs_to_pb
from twotower.wire.params import FINISH_TO_PB, PRIORITY_FROM_PB, params_from_pb, params_to_pb
from twotower.wire.state import delta_tensors, state_tensors

log = logging.getLogger(__name__)

REQUEUE_RETRY_S = 1.0
MAX_QUEUED = 5
"""How often a session is queued without a block being written: then no worker can take it."""
STALL_S = 0.5
"""How long a worker waits for a client that does not read; then the session leaves it, to be queued when it is read."""
LOST_ENTRY_S = 3.0
"""A session that waits this long checks whether Redis still has its entry."""


class ContextService(context_pb2_grpc.ContextTowerServicer):
    """Sessions from open to end. The engine is reached through `loop` only."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        engine: ContextEngine,
        loop: ContextLoop,
        queue: ReadyQueue,
        admission: Admission,
        prefixes: PrefixCache,
        transports: ContextTransports,
    ) -> None:
        self._checkpoint = checkpoint
        self._engine = engine
        self._loop = loop
        self._queue = queue
        self._admission = admission
        self._prefixes = prefixes
        self._transports = transports
        self.address = ""
        """Where workers reach this context."""
        self.sessions = SessionTable()
        self.draining = False
        self._tasks: set[asyncio.Task[None]] = set()

    async def Open(self, request: context_pb2.OpenRequest, context: Any) -> AsyncIterator[context_pb2.SessionEvent]:
        """A gateway's session: prefill, then blocks as they are finished. Ending the call ends it."""
        if self.draining:
            raise Unavailable("this context is draining")
        live = await self._open(request)
        try:
            borders = await self._prefixes.restore(live.session)
            ar = live.session.params.mode is Mode.AR
            # A worker is found while the last chunk is read.
            before_last = None if ar else lambda: self._enqueue_first(live)
            await self._loop.prefill(live.session, lambda session: self._prefixes.keep(session, borders), before_last)
            live.prefilled.set()
            if ar:
                live.decoding = self._start(self._decode(live))
            while True:
                event = await live.next_event()
                if isinstance(event, TwoTowerError):
                    raise event
                if isinstance(event, FinishReason):
                    yield context_pb2.SessionEvent(end=context_pb2.SessionEnd(finish_reason=FINISH_TO_PB[event]))
                    return
                tokens, forwards, logprobs = event
                shown = context_pb2.SessionBlock(token_ids=tokens, forwards=forwards, logprobs=logprobs_to_pb(logprobs))
                yield context_pb2.SessionEvent(block=shown)
        finally:
            self.sessions.remove(live)
            if live.entry_id is not None:
                self._start(self._dequeue(live.entry_id))
            self._start(self._give_back(live))

    async def Attach(
        self, requests: AsyncIterator[context_pb2.WorkerMessage], context: Any
    ) -> AsyncIterator[context_pb2.ContextMessage]:
        """A worker's session: the state, then a delta per block, until the end, a drain or a failure."""
        first = await anext(requests, None)
        if first is None or not first.HasField("hello"):
            raise Incompatible("message: the first one must be hello")
        check_hello(first.hello, self._checkpoint.identity, self._engine.tower.dtype)
        live = self.sessions.claim(first.hello.session_id, first.hello.lease, first.hello.worker_id)
        live.entry_id = None  # the worker takes it off the queue
        outlet: Outlet | None = None
        try:
            outlet, choice = self._transports.attach(first.hello.transport, context.peer())
            await live.unless_ended(live.prefilled.wait())
            if live.ended.is_set():
                raise SessionNotFound(f"session {live.session.id} is over")
            async with aclosing(self._serve(live, requests, outlet, choice)) as messages:
                async for message in messages:
                    yield message
        finally:
            if outlet is not None:
                await outlet.close()
            self._start(self._release(live))

    async def _serve(
        self,
        live: LiveSession,
        requests: AsyncIterator[context_pb2.WorkerMessage],
        outlet: Outlet,
        choice: context_pb2.TransportChoice,
    ) -> AsyncGenerator[context_pb2.ContextMessage]:
        session = live.session
        params, length = params_to_pb(session.params), session.state.length
        yield context_pb2.ContextMessage(attached=context_pb2.Attached(params=params, length=length, transport=choice))
        with transfer(self._loop.tracer, "send state", session.id):
            async with live.reading, aclosing(outlet.send(state_tensors(session.state, self._engine.decay_rates))) as tensors:
                async for sent in tensors:
                    yield sent
        commit: Commit | None = None
        while True:
            if not live.read.is_set() and not await self._read_soon(live):
                return  # a client that does not read must not keep a worker's slot
            refine = context_pb2.Refine(generated=session.generated, length=session.state.length)
            if commit is not None:
                refine.commit, refine.together = commit.number, commit.together
            yield context_pb2.ContextMessage(refine=refine)
            with self._loop.refining():
                message = await live.unless_ended(anext(requests, None))
            if live.ended.is_set():
                break
            if message is None:
                return  # the worker left, at a block border
            if message.HasField("failed"):
                live.fail(NonFiniteLogits(message.failed.reason))
                break
            block, logprobs = self._check_block(live, message)
            done = message.block_done
            finish = Finish(live.worker_id or "", done.forward, done.together)
            if not live.emit(block, done.forwards, logprobs):
                self._loop.arrived(finish)
                break
            committing = asyncio.create_task(self._loop.commit(session, block, finish))
            live.commit = committing
            commit = await asyncio.shield(committing)
            with transfer(self._loop.tracer, "send delta", session.id):
                async with aclosing(outlet.send(list(delta_tensors(commit.delta)))) as tensors:
                    async for sent in tensors:
                        yield sent
        yield context_pb2.ContextMessage(end=context_pb2.End())

    @staticmethod
    async def _read_soon(live: LiveSession) -> bool:
        """Whether the gateway catches up in time."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(STALL_S):
                await live.unless_ended(live.read.wait())
        return live.read.is_set() or live.ended.is_set()

    async def watch_queue(self) -> None:
        """Until cancelled: queue again what Redis has lost."""
        clock = asyncio.get_running_loop().time
        while True:
            await asyncio.sleep(LOST_ENTRY_S / 2)
            for live in self.sessions:
                if live.entry_id is None or clock() - live.waiting_since < LOST_ENTRY_S:
                    continue
                try:
                    if not await self._queue.contains(live.entry_id) and live.entry_id is not None:
                        log.warning("session %s was lost from the queue; queued again", live.session.id)
                        await self._enqueue(live)
                except BrokerUnavailable:
                    break  # logged by the heartbeat; the next round tries again

    async def _open(self, request: context_pb2.OpenRequest) -> LiveSession:
        """A session with a state to fill, once there is room for one. Raises InvalidArgument, Overloaded."""
        params, prompt = params_from_pb(request.params), list(request.prompt.ids)
        if not 0 <= request.generated < max(len(prompt), 1):
            raise InvalidArgument("generated", f"must be in [0, {len(prompt)}), not {request.generated}")
        check_request(prompt[: len(prompt) - request.generated], params, self._checkpoint.limits)
        if request.generated >= params.max_tokens:
            raise InvalidArgument("generated", f"{request.generated} tokens leave none of max_tokens {params.max_tokens}")
        priority = PRIORITY_FROM_PB.get(request.priority, Priority.NORMAL)
        state = await self._admission.acquire(room_for(len(prompt), request.generated, params), priority)
        return self.sessions.add(self._engine.open(uuid.uuid4().hex, prompt, params, request.generated, state), priority)

    async def _give_back(self, live: LiveSession) -> None:
        """Return the state of a session that is over, when the last that computes with it has ended."""
        for task in (live.commit, live.decoding):
            if task is not None:
                await asyncio.wait((task,))
        await self._loop.settle()
        async with live.reading:
            self._admission.release(live.session.state)

    def _check_block(self, live: LiveSession, message: context_pb2.WorkerMessage) -> tuple[list[int], tuple[TokenLogprob, ...]]:
        """The tokens of a finished block, and their logprobs if asked for. Raises Incompatible."""
        if not message.HasField("block_done"):
            raise Incompatible("message: expected block_done or failed")
        done, params = message.block_done, live.session.params
        if done.generated != live.session.generated:
            raise Incompatible(f"block_done.generated: {done.generated}, the session has {live.session.generated}")
        if len(done.token_ids) != params.block_size:
            raise Incompatible(f"block_done.token_ids: {len(done.token_ids)} tokens in a block of {params.block_size}")
        vocab = self._checkpoint.config.vocab_size
        if any(not 0 <= token < vocab for token in done.token_ids):
            raise Incompatible(f"block_done.token_ids: a token is outside the vocabulary [0, {vocab})")
        logprobs = logprobs_from_pb(done.logprobs)
        check_logprobs(logprobs, params.block_size, params.logprobs, vocab)
        return list(done.token_ids), logprobs

    async def _decode(self, live: LiveSession) -> None:
        """AR mode: token after token, until the end or until no one listens."""
        try:
            while not live.over:
                if not live.read.is_set():
                    await live.unless_ended(live.read.wait())
                    continue
                token = await self._loop.decode(live.session)
                if not live.emit([token], 1, live.session.logprobs):
                    return
        except TwoTowerError as error:
            live.fail(error)

    async def _release(self, live: LiveSession) -> None:
        """The worker is gone: queue the session from its last committed block, unless it is over."""
        if live.commit is not None:
            await asyncio.wait((live.commit,))
            if live.commit.exception() is not None:
                live.fail(Unavailable("a block could not be committed"))
                return
        live.worker_id = None
        await live.unless_ended(live.read.wait())
        while not live.over:
            try:
                await self._enqueue(live)
                return
            except BrokerUnavailable:
                await live.unless_ended(asyncio.sleep(REQUEUE_RETRY_S))

    def _enqueue_first(self, live: LiveSession) -> None:
        """Begin to queue a session; one that cannot be queued at all fails."""

        async def enqueue() -> None:
            try:
                await self._enqueue(live)
            except BrokerUnavailable as error:
                if live.worker_id is None:  # else only Redis' answer was lost
                    live.fail(error)

        if not live.over:
            self._start(enqueue())

    async def _enqueue(self, live: LiveSession) -> None:
        if live.queued >= MAX_QUEUED:
            live.fail(Unavailable(f"no worker could take the session: it was queued {live.queued} times"))
            return
        live.queued += 1
        live.lease += 1
        lease = live.lease
        live.entry_id = None
        live.waiting_since = asyncio.get_running_loop().time()
        ready = ReadySession(live.session.id, lease, self.address, live.session.room)
        entry_id = await self._queue.push(ready, live.priority)
        if live.over:
            await self._dequeue(entry_id)
        elif live.worker_id is None and live.lease == lease:  # a worker may have been faster than Redis' answer
            live.entry_id = entry_id

    async def _dequeue(self, entry_id: EntryId) -> None:
        try:
            await self._queue.done(entry_id)
        except BrokerUnavailable:
            log.warning("a finished session's queue entry stays in Redis until a worker drops it")

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run in the background, kept from being collected."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
