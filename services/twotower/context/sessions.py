"""The sessions of one context replica: who waits for a worker, who is attached, what their gateways are to be told."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterator, Sequence
from typing import TypeVar

from twotower.broker.ready_queue import EntryId
from twotower.engine.session import Session
from twotower.errors import LeaseLost, SessionNotFound, TwoTowerError
from twotower.request import FinishReason, Priority, TokenLogprob

T = TypeVar("T")

MAX_UNREAD = 32
"""Blocks, or AR tokens, that wait for a client who does not read them; then its session pauses."""

Event = tuple[list[int], int, Sequence[TokenLogprob]] | FinishReason | TwoTowerError
"""A block (shown tokens, forwards, logprobs if asked for), the end, or why it failed."""


class LiveSession:
    """A session and its two ends: a gateway that listens, and at most one worker."""

    def __init__(self, session: Session, priority: Priority = Priority.NORMAL) -> None:
        self.session = session
        self.priority = priority
        self.lease = 0
        """Counts how often it was queued; a worker that comes with an older one is refused."""
        self.queued = 0
        """How often it was queued since its last block."""
        self.entry_id: EntryId | None = None
        """Its entry in the ready queue, while it waits there."""
        self.worker_id: str | None = None
        """The worker that is attached."""
        self.waiting_since = 0.0
        """When it was last queued, by the loop's clock."""
        self.prefilled = asyncio.Event()
        """The prompt is read; a worker may have been attached shortly before."""
        self.commit: asyncio.Task[object] | None = None
        """The last commit; the state must not be sent before it is over."""
        self.decoding: asyncio.Task[None] | None = None
        """In AR mode, what writes its tokens."""
        self.reading = asyncio.Lock()
        """Held while the state is sent; it must not be given to another session before that is over."""
        self.ended = asyncio.Event()
        """The gateway has been told, or has gone."""
        self._failed = False
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self.read = asyncio.Event()
        """Set while the gateway keeps up with what is generated."""
        self.read.set()

    def emit(self, tokens: list[int], forwards: int, logprobs: Sequence[TokenLogprob] = ()) -> bool:
        """Take a finished block; True if the session goes on."""
        self.queued = 0
        shown = self.session.emit(tokens)
        self._events.put_nowait((shown, forwards, logprobs[: len(shown)]))
        if self._events.qsize() >= MAX_UNREAD:
            self.read.clear()
        if self.session.finish_reason is not None:
            self._events.put_nowait(self.session.finish_reason)
            return False
        return True

    @property
    def over(self) -> bool:
        """Nothing more is to be generated."""
        return self.ended.is_set() or self._failed or self.session.finish_reason is not None

    def fail(self, error: TwoTowerError) -> None:
        """End the session with an error."""
        self._failed = True
        self._events.put_nowait(error)

    async def next_event(self) -> Event:
        """For the gateway, in order."""
        event = await self._events.get()
        if self._events.qsize() < MAX_UNREAD:
            self.read.set()
        return event

    async def unless_ended(self, awaitable: Awaitable[T]) -> T | None:
        """The result, or None if the session ends first."""
        task = asyncio.ensure_future(awaitable)
        ended = asyncio.ensure_future(self.ended.wait())
        try:
            await asyncio.wait((task, ended), return_when=asyncio.FIRST_COMPLETED)
            return await task if task.done() else None
        finally:
            for leftover in (task, ended):
                leftover.cancel()


class SessionTable:
    """All live sessions, by id."""

    def __init__(self) -> None:
        self._sessions: dict[str, LiveSession] = {}
        self.empty = asyncio.Event()
        """Set while there is none."""
        self.empty.set()

    def __len__(self) -> int:
        return len(self._sessions)

    def __iter__(self) -> Iterator[LiveSession]:
        return iter(list(self._sessions.values()))

    def add(self, session: Session, priority: Priority) -> LiveSession:
        """Hold a session."""
        live = self._sessions[session.id] = LiveSession(session, priority)
        self.empty.clear()
        return live

    def remove(self, live: LiveSession) -> None:
        """The session is over; whoever is attached is told."""
        self._sessions.pop(live.session.id, None)
        live.ended.set()
        if not self._sessions:
            self.empty.set()

    def claim(self, session_id: str, lease: int, worker_id: str) -> LiveSession:
        """Attach a worker. Raises SessionNotFound, LeaseLost."""
        live = self._sessions.get(session_id)
        if live is None:
            raise SessionNotFound(f"session {session_id} is over")
        if live.worker_id is not None:
            raise LeaseLost(f"session {session_id} is held by {live.worker_id}")
        if live.lease != lease:
            raise LeaseLost(f"session {session_id} has lease {live.lease}, not {lease}")
        live.worker_id = worker_id
        return live
