"""Pulls ready sessions while there are free slots, and works on each until it leaves."""

from __future__ import annotations

import asyncio
import contextlib
import logging

import grpc

from twotower.broker.ready_queue import EntryId, ReadyQueue, ReadySession
from twotower.denoiser.attachment import Attachment
from twotower.denoiser.loop import DenoiserLoop
from twotower.engine.admission import Admission
from twotower.errors import BrokerUnavailable, TwoTowerError
from twotower.model.checkpoint import Checkpoint
from twotower.model.pool import StatePool
from twotower.model.state import ContextState
from twotower.rpc.channel import open_channel
from twotower.rpc.errors import error_from_rpc
from twotower.tasks import end_tasks
from twotower.transport.ends import WorkerTransports

log = logging.getLogger(__name__)

PULL_WAIT_S = 2.0
FLUSH_S = 2.0
BROKER_RETRY_S = 1.0


class Worker:
    """As many sessions at a time as its pool has slots, from any context replica."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        loop: DenoiserLoop,
        queue: ReadyQueue,
        worker_id: str,
        pool: StatePool,
        transports: WorkerTransports,
    ) -> None:
        self._checkpoint = checkpoint
        self._loop = loop
        self._queue = queue
        self.id = worker_id
        """Its name in the queue and the registry."""
        self._transports = transports
        self.slots = pool.size.slots
        """Sessions it takes at once."""
        self._admission = Admission(pool, max_waiting=self.slots)
        self._free = asyncio.Semaphore(self.slots)
        self._sessions: set[asyncio.Task[None]] = set()
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._drain = asyncio.Event()

    @property
    def load(self) -> int:
        """Sessions here."""
        return len(self._sessions)

    async def pull(self) -> None:
        """Until cancelled: take sessions off the queue, as many as fit."""
        while True:
            await self._free.acquire()
            self._free.release()
            try:
                entries = await self._queue.pull(self.id, self.slots - self.load, PULL_WAIT_S)
            except BrokerUnavailable:
                await asyncio.sleep(BROKER_RETRY_S)  # the heartbeat logs it
                continue
            for entry_id, ready in entries:
                await self._free.acquire()
                task = asyncio.create_task(self._serve(entry_id, ready))
                self._sessions.add(task)
                task.add_done_callback(self._leave)

    async def drain(self, timeout_s: float) -> None:
        """Hand every session back at its next block border. `pull` must have ended."""
        self._drain.set()
        if self._sessions:
            await asyncio.wait(self._sessions, timeout=timeout_s)
        await end_tasks(*self._sessions)
        with contextlib.suppress(BrokerUnavailable):
            await self._queue.flush()
        for channel in self._channels.values():
            await channel.close(None)

    def _leave(self, task: asyncio.Task[None]) -> None:
        self._sessions.discard(task)
        self._free.release()

    async def flush(self) -> None:
        """Until cancelled: see that what is done leaves the queue even while this worker, being full, does not pull."""
        while True:
            await asyncio.sleep(FLUSH_S)
            with contextlib.suppress(BrokerUnavailable):
                await self._queue.flush()

    async def _serve(self, entry_id: EntryId, ready: ReadySession) -> None:
        try:
            state = await self._admission.acquire(ready.tokens)
        except TwoTowerError as error:  # the context will see that its entry is gone, and queue it for others
            log.error("session %s does not fit this worker: %s", ready.session_id, error)
            self._queue.done_soon(entry_id)
            return
        try:
            await self._attach(entry_id, ready, state)
        finally:
            await self._loop.settle()
            self._admission.release(state)

    async def _attach(self, entry_id: EntryId, ready: ReadySession, state: ContextState) -> None:
        channel = self._channels.get(ready.context_address)
        if channel is None:
            channel = self._channels[ready.context_address] = open_channel(ready.context_address)
        attached = asyncio.Event()
        acknowledge = asyncio.create_task(self._acknowledge(entry_id, attached))
        try:
            attachment = Attachment(self._checkpoint, self._loop, self.id, state, self._transports)
            await attachment.run(channel, ready, attached, self._drain)
        except grpc.aio.AioRpcError as rpc:
            # The session is the context's to queue again, or the gateway's to open elsewhere.
            log.warning("session %s left: %s", ready.session_id, error_from_rpc(rpc))
        except TwoTowerError as error:
            log.error("session %s left: %s", ready.session_id, error)
        except Exception:
            log.exception("session %s left", ready.session_id)
        finally:
            attached.set()
            await acknowledge

    async def _acknowledge(self, entry_id: EntryId, attached: asyncio.Event) -> None:
        """Take the entry off the queue once its fate is known: attached, or refused."""
        await attached.wait()
        self._queue.done_soon(entry_id)
