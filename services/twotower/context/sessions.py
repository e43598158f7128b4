"""The sessions of one context replica: how they are opened, queued, held by workers, written, and ended.

The states belong to the loop. This module decides who may write, and sends that decision to the loop and to the workers. All of
it runs in the event loop, and whatever was decided before an await is checked again behind it.
"""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Coroutine, Iterator, Sequence
from typing import Any

from twotower.broker.ready_queue import EntryId, ReadyQueue, ReadySession
from twotower.context.copies import Copy
from twotower.context.link import WorkerLink
from twotower.context.live import LiveSession
from twotower.context.loop import ContextLoop
from twotower.context.messages import (
    CloseSession,
    CommitBlocks,
    Committed,
    ContextResult,
    CopySent,
    CopyState,
    OpenSession,
    PrefixHit,
    PrefixLoaded,
    PrefixWanted,
    SessionFailed,
    SetPaused,
    StateCopied,
    StateSoonReady,
    TokenDecoded,
    WorkerLeft,
)
from twotower.context.metrics import ContextMetrics
from twotower.engine.context_engine import Round
from twotower.engine.effort import Times
from twotower.engine.session import Piece
from twotower.errors import BrokerUnavailable, Draining, NonFiniteLogits, RequestFailed, TwoTowerError
from twotower.internal.v1 import link_pb2
from twotower.prefix.redis_tier import RedisTier
from twotower.request import DraftUse, TokenLogprob
from twotower.tasks import end_tasks

log = logging.getLogger(__name__)

MAX_FAILURES = 4
"""Failures in a row, without a block between them, that end a request, wherever they come from."""
BROKER_WAIT_S = 30.0
"""How long a session waits for a Redis that does not answer, before it fails."""
CLOSE_S = 1.0
BROKER_RETRY_S = 0.25
LOST_ENTRY_S = 3.0
"""A session that waits this long looks whether Redis still has its entry."""


class Sessions:
    """All live sessions, by id."""

    def __init__(
        self, loop: ContextLoop, queue: ReadyQueue, redis: RedisTier | None, metrics: ContextMetrics | None = None
    ) -> None:
        self.metrics = metrics or ContextMetrics()
        self._loop = loop
        self._queue = queue
        self._redis = redis
        self._sessions: dict[str, LiveSession] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self.address = ""
        """Where workers reach this context."""
        self.empty = asyncio.Event()
        """Set while there is none."""
        self.empty.set()

    def __len__(self) -> int:
        return len(self._sessions)

    def __iter__(self) -> Iterator[LiveSession]:
        return iter(list(self._sessions.values()))

    def get(self, session_id: str) -> LiveSession | None:
        """The session, unless it is over."""
        return self._sessions.get(session_id)

    @property
    def times(self) -> Times:
        """Of what a draft takes and earns here."""
        return self._loop.times

    # Gateways

    def open(self, live: LiveSession, tokens: Sequence[int], rounds: Sequence[int] = ()) -> None:
        """Hold a session, and have its prompt read once there is room; rounds: see `OpenSession`."""
        self._sessions[live.id] = live
        live.opened = asyncio.get_running_loop().time()
        self.metrics.prompt_tokens.inc(live.tokens)
        self.empty.clear()
        self._loop.inbox.put(OpenSession(live.id, tokens, live.transcript.generated, live.params, live.priority, rounds))

    def end(self, live: LiveSession) -> None:
        """The session is over, or its gateway has gone. Safe to call again."""
        live.over = True
        if self._sessions.pop(live.id, None) is None:
            return
        self.metrics.ended()
        self._let_go(live, link_pb2.END_REASON_OVER)
        self._take_off(live)
        self._loop.inbox.put(CloseSession(live.id))
        if not self._sessions:
            self.empty.set()

    def has_read(self, live: LiveSession) -> None:
        """The gateway has taken an event."""
        if live.resume():
            self._loop.inbox.put(SetPaused(live.id, False))
            if live.wants_worker and live.link is None and live.entry_id is None:
                self.metrics.requeued.labels("resumed").inc()
                self._enqueue(live)

    def let_go(self) -> None:
        """End every session here: its gateway opens it elsewhere, from the blocks that it has."""
        for live in self:
            live.fail(Draining("this context is draining"))
            self.end(live)

    @property
    def unread(self) -> list[LiveSession]:
        """Those whose prompt is not read yet."""
        return [live for live in self if not live.read]

    @property
    def queued(self) -> list[LiveSession]:
        """Those that wait in the queue for a denoiser."""
        return [live for live in self if live.entry_id is not None]

    # Workers

    def attach(self, link: WorkerLink, ref: link_pb2.SessionRef) -> None:
        """A worker wants a session that it pulled off the queue."""
        live = self._sessions.get(ref.id)
        if live is None or live.over:
            link.end(ref, link_pb2.END_REASON_OVER)
        elif live.link is not None or live.lease != ref.lease:
            link.end(ref, link_pb2.END_REASON_LEASE_LOST)
        else:
            live.link = link
            self.metrics.queue_seconds.observe(asyncio.get_running_loop().time() - live.waiting_since)
            live.entry_id = None  # the worker takes it off the queue
            link.held[live.id] = live
            self._loop.inbox.put(CopyState(live.id, live.lease))

    def blocks_done(self, blocks: Sequence[tuple[LiveSession, link_pb2.BlockDone, Sequence[TokenLogprob]]]) -> None:
        """Take checked blocks that one forward finished: each is shown at once, and committed unless it is the last.

        A draft is verified first.
        """
        pieces: list[tuple[str, Piece]] = []
        for live, block, logprobs in blocks:
            self._set_writing(live, False)
            tokens = list(block.token_ids)
            live.handed_in = asyncio.get_running_loop().time()
            if live.effort is not None:
                live.draft_forwards = block.forwards
                if block.forwards and block.seconds > 0:
                    self._loop.times.measured("step", block.seconds / block.forwards)
                pieces.append((live.id, Piece(tokens, None)))
                continue
            live.failures = 0
            live.emit(tokens, block.forwards, logprobs)
            self.metrics.generation_tokens.labels(live.params.mode.value).inc(len(block.token_ids))
            if live.over:
                self.end(live)
            else:
                pieces.append((live.id, Piece(tokens, len(tokens))))
        if pieces:
            self._loop.inbox.put(CommitBlocks(pieces))

    def detached(self, link: WorkerLink, detached: link_pb2.Detached) -> None:
        """A worker lets go of a session."""
        live = link.holds(detached.session)
        if live is None:
            return
        self._forget(live)
        if detached.reason == link_pb2.DETACH_REASON_NOT_FINITE:
            self._give_up(live, NonFiniteLogits(detached.detail))
        elif detached.reason == link_pb2.DETACH_REASON_HANDED_BACK:
            self._requeue(live, "handed_back")
        else:
            self._failed(live, detached.detail or "the denoiser failed on it", "failed")

    def copy_sent(self, copy: Copy) -> None:
        """A copied state needs its memory no more."""
        self._loop.inbox.put(CopySent(copy))

    def on_way(self, transfers: int) -> None:
        """More transfers are on their way; fewer, where negative: they have arrived, or are lost."""
        self._loop.outbound.on_way += transfers

    def lost(self, link: WorkerLink, why: str) -> None:
        """A worker has gone: its sessions go on elsewhere, from their last committed blocks."""
        for live in list(link.held.values()):
            suspect = live.writing  # whose block it was at; others had no part in its end
            self._forget(live)
            if suspect:
                self._failed(live, why, "worker_lost")
            else:
                self._requeue(live, "worker_lost")

    # The loop

    def take(self, results: Sequence[ContextResult]) -> None:
        """What the loop has delivered."""
        try:
            for result in results:
                self._take(result)
        finally:
            self._loop.outbound.taken += 1

    def _take(self, result: ContextResult) -> None:
        if isinstance(result, Committed):
            self._committed(result)
        elif isinstance(result, PrefixHit):
            if self._redis is not None:
                self._redis.store_later(result.links, len(result.links), result.snapshot)
        elif (live := self._sessions.get(result.session_id)) is None:
            if isinstance(result, StateCopied):
                self.copy_sent(result.copy)
            # The session is over: its CloseSession is in the inbox, or has been taken.
        elif isinstance(result, StateSoonReady):
            live.read = True
            self.metrics.prefill_seconds.observe(asyncio.get_running_loop().time() - live.opened)
            if live.wants_worker:
                self._enqueue(live)
        elif isinstance(result, TokenDecoded):
            self._decoded(live, result)
        elif isinstance(result, StateCopied):
            if live.link is not None and live.lease == result.lease:
                self._set_writing(live, True)
                live.has_state = True
                live.link.send_state(live, result)
            else:
                self.copy_sent(result.copy)
        elif isinstance(result, PrefixWanted):
            self._start(self._load_prefix(result))
        elif isinstance(result, SessionFailed):
            self._end_with(live, result.error)

    def _end_with(self, live: LiveSession, error: TwoTowerError) -> None:
        self.metrics.failed.labels(type(error).__name__).inc()
        live.fail(error)
        self.end(live)

    def _decoded(self, live: LiveSession, result: TokenDecoded) -> None:
        """Show what the context has written alone."""
        live.read = True
        self.metrics.generation_tokens.labels(live.params.mode.value).inc()
        if live.effort is None:
            live.emit([result.token], 1, result.logprobs)
        else:
            live.emit([result.token], 0, result.logprobs, DraftUse(context_forwards=result.forwards))
        if live.over:
            self.end(live)
        elif live.paused:
            self._loop.inbox.put(SetPaused(live.id, True))
        elif live.effort is not None and live.resting:
            live.effort.stepped()
            if live.wants_worker:
                self._enqueue(live)

    def _verified(self, live: LiveSession, verified: Round) -> None:
        """Show what a round has written."""
        assert live.effort is not None
        live.failures = 0
        self.metrics.generation_tokens.labels(live.params.mode.value).inc(len(verified.tokens))
        live.emit(verified.tokens, live.draft_forwards, verified.logprobs, verified.use(live.params.block_size))
        live.effort.verified(len(verified.tokens), self._loop.times)
        if live.over:
            self.end(live)

    def _committed(self, result: Committed) -> None:
        """Send each worker its rows. A session that has no worker any more is queued already, or will be."""
        rows: dict[WorkerLink, list[tuple[int, LiveSession, int]]] = defaultdict(list)
        now = asyncio.get_running_loop().time()
        self.metrics.commit_blocks.observe(len(result.session_ids))
        for row, (session_id, length) in enumerate(zip(result.session_ids, result.lengths, strict=True)):
            live = self._sessions.get(session_id)
            if live is not None and live.handed_in:
                self.metrics.commit_seconds.observe(now - live.handed_in)
                live.handed_in = 0.0
            if live is not None and (verified := result.rounds[row]) is not None:
                self._verified(live, verified)
            if live is None or live.link is None or not live.has_state:  # a copy of the whole state is still to come
                continue
            if live.paused:  # a client that does not read must not keep a worker's slot
                self._let_go(live, link_pb2.END_REASON_PAUSED)
                self._loop.inbox.put(SetPaused(live.id, True))
                continue
            if live.resting:
                self._let_go(live, link_pb2.END_REASON_RESTING)
                continue
            self._set_writing(live, True)
            rows[live.link].append((row, live, length))
        for link, own in rows.items():
            link.send_committed(result.deltas, own)

    # Who holds a session

    def _forget(self, live: LiveSession) -> None:
        self._set_writing(live, False)
        live.has_state = False
        if live.link is not None:
            live.link.held.pop(live.id, None)
            live.link = None
            live.lease += 1
            self._loop.inbox.put(WorkerLeft(live.id))

    def _let_go(self, live: LiveSession, reason: link_pb2.EndReason.ValueType) -> None:
        """Take a session away from its worker, if it has one."""
        link, ref = live.link, link_pb2.SessionRef(id=live.id, lease=live.lease)
        self._forget(live)
        if link is not None:
            link.end(ref, reason)

    def _set_writing(self, live: LiveSession, writing: bool) -> None:
        self._loop.refining += writing - live.writing
        live.writing = writing

    def _failed(self, live: LiveSession, why: str, kind: str) -> None:
        """One failure more, of the request's one budget. kind: the label of its requeue."""
        live.failures += 1
        if live.over:
            return
        if live.failures >= MAX_FAILURES:
            times = f"{live.failures} times without a block between"
            self._give_up(live, RequestFailed(f"the request failed {times}; the last time: {why}"))
            return
        log.warning("session %s goes on elsewhere (failure %d): %s", live.id, live.failures, why)
        self._requeue(live, kind)

    def _give_up(self, live: LiveSession, error: TwoTowerError) -> None:
        """No worker can write the session: it ends; in speculative mode the context writes the rest of it alone."""
        if live.effort is None:
            self._end_with(live, error)
        else:
            log.warning("session %s goes on without drafts: %s", live.id, error)
            live.effort.give_up()

    # The ready queue

    def _requeue(self, live: LiveSession, kind: str) -> None:
        """Queue a session that has lost its worker. One that does not want a worker now is queued when it does."""
        if live.wants_worker:
            self.metrics.requeued.labels(kind).inc()
            self._enqueue(live)

    def _enqueue(self, live: LiveSession) -> None:
        """Queue a session for any worker, under a new lease."""
        live.lease += 1
        live.entry_id = None
        live.waiting_since = asyncio.get_running_loop().time()
        self._start(self._push(live, live.lease))

    async def _push(self, live: LiveSession, lease: int) -> None:
        ready = ReadySession(live.id, lease, self.address, live.room)
        clock = asyncio.get_running_loop().time
        give_up = clock() + BROKER_WAIT_S

        def waits() -> bool:
            """Whether it still waits: a worker may pull the entry before Redis has answered here, or where it never does."""
            return not live.over and live.lease == lease and live.link is None

        while waits():
            try:
                entry = await self._queue.push(ready, live.priority, wait_s=0)
            except BrokerUnavailable as error:
                if clock() < give_up:
                    await asyncio.sleep(BROKER_RETRY_S)
                    continue
                if not waits():
                    return
                if live.effort is not None:  # nothing is lost but speed
                    live.effort.rest()
                    return
                self._end_with(live, error)
                return
            except Exception as error:
                log.error("session %s could not be queued", live.id, exc_info=error)
                if waits():
                    self._failed(live, "it could not be queued", "not_queued")
                return
            if live.over or live.lease != lease:
                await self._remove(entry)
            elif live.link is None:  # else a worker was faster than Redis' answer, and takes it off
                live.entry_id = entry
            return

    def _take_off(self, live: LiveSession) -> None:
        entry, live.entry_id = live.entry_id, None
        if entry is not None:
            self._start(self._remove(entry))

    async def _remove(self, entry: EntryId) -> None:
        try:
            await self._queue.done(entry)
        except BrokerUnavailable:
            log.warning("a finished session's queue entry stays in Redis until a worker drops it")

    async def watch_queue(self) -> None:
        """Until cancelled: queue again what Redis, or a worker that took it off and never came, has lost."""
        clock = asyncio.get_running_loop().time
        while True:
            await asyncio.sleep(LOST_ENTRY_S / 2)
            for live in self:
                entry = live.entry_id
                if entry is None or clock() - live.waiting_since < LOST_ENTRY_S:
                    continue
                try:
                    there = await self._queue.contains(entry)
                except BrokerUnavailable:
                    break  # the heartbeat logs it; the next round tries again
                if live.entry_id != entry or live.over:
                    continue
                if there or live.missing != entry:  # a worker may just have taken it off, and be about to ask for the session
                    live.missing = None if there else entry
                else:
                    live.entry_id = None
                    self._failed(live, "its entry was lost from the queue", "entry_lost")

    # The prefix tier of all replicas

    async def _load_prefix(self, wanted: PrefixWanted) -> None:
        chunks, snapshot = 0, None
        try:
            if self._redis is not None and (chunks := await self._redis.longest(wanted.links)):
                snapshot = await self._redis.load(wanted.links[:chunks], chunks)
        finally:
            self._loop.inbox.put(PrefixLoaded(wanted.session_id, chunks, snapshot))

    async def close(self) -> None:
        """End what runs in the background, once the loop has ended; what is to be taken off the queue has a moment for it."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=CLOSE_S)
        await end_tasks(*self._tasks)

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        """Run in the background, kept from being collected, until `close`."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("work for a session failed", exc_info=error)
