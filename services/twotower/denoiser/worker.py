"""Pulls ready sessions while there are free slots, and works on each until it leaves."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any

import torch
from opentelemetry.trace import Tracer

from twotower.broker.ready_queue import EntryId, ReadyQueue, ReadySession
from twotower.denoiser.link import ContextLink, dial
from twotower.denoiser.loop import DenoiserLoop
from twotower.denoiser.messages import (
    BlocksFinished,
    BlocksShown,
    DenoiserResult,
    Held,
    Leave,
    SessionsFailed,
    SlotsFree,
    TensorsRead,
)
from twotower.denoiser.metrics import DenoiserMetrics
from twotower.engine.progress import Progress
from twotower.errors import BrokerUnavailable
from twotower.model.checkpoint import Checkpoint
from twotower.model.pool import StatePool
from twotower.tasks import end_tasks
from twotower.tracing.recorder import NO_TRACER
from twotower.transport.ends import WorkerTransports

log = logging.getLogger(__name__)

Dial = Callable[[str], AbstractAsyncContextManager[Any]]

PULL_WAIT_S = 2.0
FLUSH_S = 2.0
REFUSED_S = 1.0
"""How long a worker leaves the queue to others when it has given back what it has no room for."""
BROKER_RETRY_S = 1.0


class Worker:
    """As many sessions at a time as its pool has slots, from any context replica. Used in the event loop only."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        loop: DenoiserLoop,
        queue: ReadyQueue,
        worker_id: str,
        pool: StatePool,
        transports: WorkerTransports,
        progress: Progress,
        tracer: Tracer = NO_TRACER,
        dial: Dial = dial,
        metrics: DenoiserMetrics | None = None,
    ) -> None:
        """dial: how a context is called."""
        self.metrics = metrics or DenoiserMetrics()
        self.loop = loop
        self.dial = dial
        self.id = worker_id
        """Its name in the queue and the registry."""
        self.transports = transports
        self.progress = progress
        self.slots = pool.size.slots
        """Sessions that it takes at once."""
        self.identity, self.config = checkpoint.identity, checkpoint.config
        self.dtype: torch.dtype = pool.dtype
        self.device: torch.device = pool.device
        self._pool = pool
        self._queue = queue
        self._tracer = tracer
        self._held: dict[Held, str] = {}
        """The sessions that have, or will have, a slot here, and the addresses of their contexts."""
        self._links: dict[str, ContextLink] = {}
        self._running: dict[ContextLink, asyncio.Task[None]] = {}
        self._freed = asyncio.Event()
        self._draining = False

    @property
    def refining(self) -> int:
        """Blocks under way here."""
        return sum(link.refining for link in list(self._links.values()))

    @property
    def draining(self) -> bool:
        """Whether no session is taken."""
        return self._draining

    @property
    def load(self) -> int:
        """Sessions here."""
        return len(self._held)

    async def pull(self) -> None:
        """Until cancelled: take sessions off the queue, as many as there are free slots."""
        while True:
            while self.load >= self.slots or self._draining:
                self._freed.clear()
                await self._freed.wait()
            try:
                entries = await self._queue.pull(self.id, self.slots - self.load, PULL_WAIT_S)
            except BrokerUnavailable:
                await asyncio.sleep(BROKER_RETRY_S)  # the heartbeat logs it
                continue
            refused = [ready for entry_id, ready in entries if not self._attach(entry_id, ready)]
            if refused:
                await asyncio.sleep(REFUSED_S)

    async def flush(self) -> None:
        """Until cancelled: see that what is done leaves the queue even while this worker, being full, does not pull."""
        while True:
            await asyncio.sleep(FLUSH_S)
            with contextlib.suppress(BrokerUnavailable):
                await self._queue.flush()

    def begin_drain(self) -> None:
        """Take no sessions from now on, and hand each back at its next block border."""
        self._draining = True
        for link in self._links.values():
            link.hand_back()

    def call_off(self) -> None:
        """Take sessions again."""
        self._draining = False
        self._freed.set()

    async def drain(self, timeout_s: float, working: asyncio.Task[None] | None = None) -> None:
        """Hand every session back at its next block border, and close all links. `pull` must have ended.

        working: the engine's loop. When that ends before, no session can get to its border, and none is waited for.
        """
        if working is not None:
            working.add_done_callback(lambda _: self._freed.set())
        self.begin_drain()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while self._held and (working is None or not working.done()):
                    self._freed.clear()
                    await self._freed.wait()
        for link in self._links.values():
            link.close()
        if self._running:
            await asyncio.wait(self._running.values(), timeout=min(timeout_s, 1.0))
        await end_tasks(*self._running.values())
        with contextlib.suppress(BrokerUnavailable):
            await self._queue.flush()

    def leave(self, held: Sequence[Held]) -> None:
        """Sessions are not this worker's any more: their slots become free between two forwards."""
        if held:
            self.loop.inbox.put(Leave(held))

    def take(self, results: Sequence[DenoiserResult]) -> None:
        """What the loop has delivered."""
        for result in results:
            if isinstance(result, BlocksFinished):
                if (link := self._links.get(result.context)) is not None:
                    link.hand_in(result)
                    if self._draining:
                        link.hand_back()
            elif isinstance(result, BlocksShown):
                if (link := self._links.get(result.context)) is not None:
                    link.show(result)
            elif isinstance(result, TensorsRead):
                result.received.release()
            elif isinstance(result, SlotsFree):
                self._free(result.held)
            elif isinstance(result, SessionsFailed):
                for held, error in result.sessions:
                    if (link := self._links.get(self._held.get(held, ""))) is not None:
                        link.fail(held, error)
                self._free([held for held, _ in result.sessions])

    def _attach(self, entry_id: EntryId, ready: ReadySession) -> bool:
        """Ask for the session; False if it can never be served here, and is given back."""
        # Whatever comes of it, the entry has done its part: a session that is lost now is queued again by its context.
        self._queue.done_soon(entry_id)
        held = Held(ready.session_id, ready.lease)
        if held in self._held:
            return True  # delivered twice
        if not self._pool.ever_fits(ready.tokens):
            log.error("session %s does not fit this worker: it needs room for %d tokens", ready.session_id, ready.tokens)
            self._link_to(ready.context_address).refuse(held, f"a worker has no room for {ready.tokens} tokens")
            return False
        self._held[held] = ready.context_address
        link = self._link_to(ready.context_address)
        link.attach(held, ready)
        if self._draining:  # it was on its way when the drain began
            link.hand_back()
        return True

    def _link_to(self, address: str) -> ContextLink:
        link = self._links.get(address)
        if link is None or link.closed:
            link = self._links[address] = ContextLink(self, address, self._tracer)
            self._running[link] = task = asyncio.create_task(link.run())
            task.add_done_callback(lambda _: self._ended(link, address))
        return link

    def _ended(self, link: ContextLink, address: str) -> None:
        task = self._running.pop(link)
        if self._links.get(address) is link:
            del self._links[address]
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("the link to context %s failed", address, exc_info=error)

    def _free(self, held: Sequence[Held]) -> None:
        for one in held:
            self._held.pop(one, None)
        self._freed.set()
