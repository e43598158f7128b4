"""A context's end of the link to one worker: one stream for all the sessions that the worker holds."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from opentelemetry.trace import Tracer
from torch import Tensor

from twotower.context.live import LiveSession
from twotower.context.messages import StateCopied
from twotower.errors import Incompatible, LeaseLost, TwoTowerError
from twotower.internal.v1 import link_pb2
from twotower.model.delta_batch import DeltaBatch
from twotower.request import ModelLimits, TokenLogprob
from twotower.tasks import end_tasks
from twotower.tracing.recorder import transfer
from twotower.transport.interface import Header, Outlet
from twotower.transport.layout import off_loop
from twotower.wire.frames import Key
from twotower.wire.logprobs import check_logprobs, logprobs_from_pb
from twotower.wire.params import params_to_pb
from twotower.wire.state import delta_tensors
from twotower.wire.steps import step_fits, step_from_pb

if TYPE_CHECKING:
    from twotower.context.sessions import Sessions

log = logging.getLogger(__name__)

Read = Callable[[], Awaitable[link_pb2.WorkerMessage | None]]
"""The worker's next message; None at the end of the stream."""
Write = Callable[[link_pb2.ContextMessage], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class _Transfer:
    """Tensors on their way, in line behind what was sent before."""

    name: str
    """Of the span."""
    what: str
    """State or commit, for the metrics."""
    session_ids: Sequence[str]
    tensors: Callable[[], Awaitable[Sequence[tuple[Key, Tensor]]]]
    header: Header
    wanted: Callable[[], bool] = lambda: True
    """Whether anybody still waits for it."""
    sent: Callable[[], None] = lambda: None
    """Called once, when the tensors are not needed here any more."""


class WorkerLink:
    """Sends in order, and hands what comes to `Sessions`, until either end goes or the worker is silent for too long."""

    def __init__(
        self,
        sessions: Sessions,
        worker_id: str,
        outlet: Outlet,
        limits: ModelLimits,
        tracer: Tracer,
        silence_s: float,
        *,
        says_arrived: bool = False,
    ) -> None:
        """silence_s: how long the worker may say nothing; says_arrived: whether it says when tensors have arrived."""
        self.worker_id = worker_id
        self.held: dict[str, LiveSession] = {}
        """The sessions that the worker holds; kept by `Sessions`."""
        self._sessions, self._outlet, self._limits, self._tracer = sessions, outlet, limits, tracer
        self._silence_s, self._says_arrived = silence_s, says_arrived
        self._outgoing: asyncio.Queue[link_pb2.ContextMessage | _Transfer] = asyncio.Queue()
        self._heard = asyncio.get_running_loop().time()
        self._on_way = 0
        """Transfers that have not arrived, where the worker says when they have."""

    # What Sessions asks for. Nothing here waits.

    def end(self, ref: link_pb2.SessionRef, reason: link_pb2.EndReason.ValueType) -> None:
        """The worker holds this session no longer."""
        ended = link_pb2.SessionEnded(session=ref, reason=reason)
        self._outgoing.put_nowait(link_pb2.ContextMessage(ended=link_pb2.Ended(sessions=[ended])))

    def send_state(self, live: LiveSession, copied: StateCopied) -> None:
        """A session's whole state."""
        state = link_pb2.State(
            session=_ref(live),
            params=params_to_pb(live.params),
            length=copied.length,
            generated=live.transcript.generated,
            draft=self._draft(live),
        )

        async def tensors() -> Sequence[tuple[Key, Tensor]]:
            return list(copied.copy.tensors.items())

        def header(placed: link_pb2.Placed | None) -> link_pb2.ContextMessage:
            if placed is not None:
                state.tensors.CopyFrom(placed)
            return link_pb2.ContextMessage(state=state)

        def wanted() -> bool:
            return self.holds(ref) is not None

        def sent() -> None:
            self._sessions.copy_sent(copied.copy)

        ref = _ref(live)
        self._put(_Transfer("send state", "state", [live.id], tensors, header, wanted, sent))

    def send_committed(self, deltas: DeltaBatch, rows: Sequence[tuple[int, LiveSession, int]]) -> None:
        """What a commit made of this worker's blocks: rows of `deltas`, with their sessions and the lengths of their states."""
        own = [row for row, _, _ in rows]
        kept = [deltas.length if deltas.counts is None else deltas.counts[row] for row in own]
        committed = link_pb2.BlocksCommitted(block_size=max(kept))
        for count, (_, live, length) in zip(kept, rows, strict=True):
            committed.rows.add(
                session=_ref(live),
                kept=count,
                length=length,
                generated=live.transcript.generated,
                draft=self._draft(live),
            )

        async def tensors() -> Sequence[tuple[Key, Tensor]]:
            return await off_loop(deltas.num_bytes, deltas.device, lambda: delta_tensors(deltas.select(own)))

        def header(placed: link_pb2.Placed | None) -> link_pb2.ContextMessage:
            if placed is not None:
                committed.tensors.CopyFrom(placed)
            return link_pb2.ContextMessage(committed=committed)

        self._put(_Transfer("send delta", "commit", [live.id for _, live, _ in rows], tensors, header))

    def _draft(self, live: LiveSession) -> link_pb2.Draft | None:
        """What is known of the session's next block, if that is a draft."""
        if live.effort is None or live.last_token is None:
            return None
        return link_pb2.Draft(token=live.last_token, steps=live.effort.choose() or 1)

    def _put(self, item: _Transfer) -> None:
        if self._says_arrived:
            self._on_way += 1
            self._sessions.on_way(1)
        self._outgoing.put_nowait(item)

    def _has_arrived(self) -> None:
        if self._on_way:
            self._on_way -= 1
            self._sessions.on_way(-1)

    def holds(self, ref: link_pb2.SessionRef) -> LiveSession | None:
        """The session, if the worker holds it under that lease; a message about any other is dropped."""
        live = self.held.get(ref.id)
        return live if live is not None and live.lease == ref.lease else None

    # The stream

    async def run(self, read: Read, write: Write) -> None:
        """Until the worker ends the stream; the outlet is the caller's to close.

        Raises LeaseLost when the worker is silent, Incompatible when a message of it does not fit the protocol or the session.
        """
        tasks = [asyncio.create_task(work) for work in (self._read(read), self._send(write), self._watch())]
        why = "the worker has gone"
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        except TwoTowerError as error:
            why = str(error)
            raise
        finally:
            self._sessions.lost(self, why)
            self._sessions.on_way(-self._on_way)
            self._says_arrived, self._on_way = False, 0
            await end_tasks(*tasks)
            while not self._outgoing.empty():
                item = self._outgoing.get_nowait()
                if isinstance(item, _Transfer):
                    item.sent()

    async def _read(self, read: Read) -> None:
        while (message := await read()) is not None:
            self._heard = asyncio.get_running_loop().time()
            match message.WhichOneof("message"):
                case "attach":
                    for ref in message.attach.sessions:
                        self._sessions.attach(self, ref)
                case "done":
                    self._take_blocks(message.done.blocks)
                case "stepped":
                    self._show(message.stepped.blocks)
                case "detach":
                    for detached in message.detach.sessions:
                        self._sessions.detached(self, detached)
                case "arrived":
                    self._has_arrived()
                case "alive":
                    pass
                case other:
                    raise Incompatible(f"message: {other or 'an empty one'} is not expected here")

    async def _send(self, write: Write) -> None:
        while True:
            item = await self._outgoing.get()
            if isinstance(item, link_pb2.ContextMessage):
                await write(item)
                continue
            if not item.wanted():
                item.sent()
                self._has_arrived()
                continue
            spans = [transfer(self._tracer, item.name, session_id) for session_id in item.session_ids]
            try:
                tensors, began = await item.tensors(), asyncio.get_running_loop().time()
                await self._outlet.send(tensors, item.header, write)
                size, seconds = sum(t.nbytes for _, t in tensors), asyncio.get_running_loop().time() - began
                self._sessions.metrics.sent(self._outlet.kind.value, item.what, size, seconds)
            finally:
                item.sent()
                for span in spans:
                    span.end()

    async def _watch(self) -> None:
        clock = asyncio.get_running_loop().time
        while True:
            quiet = clock() - self._heard
            if quiet >= self._silence_s:
                log.warning("worker %s is silent, and loses its %d sessions", self.worker_id, len(self.held))
                raise LeaseLost(f"worker {self.worker_id} was silent for {quiet:.1f} s")
            await asyncio.sleep(self._silence_s - quiet + 0.01)

    def _take_blocks(self, blocks: Sequence[link_pb2.BlockDone]) -> None:
        if len({block.session.id for block in blocks}) < len(blocks):
            raise Incompatible("done.blocks: two blocks of one session")
        held = [(live, block) for block in blocks if (live := self.holds(block.session)) is not None]
        taken = [(live, block, self._checked(live, block)) for live, block in held]
        self._sessions.blocks_done(taken)

    def _show(self, blocks: Sequence[link_pb2.BlockStepped]) -> None:
        """Blocks on their way. What does not belong to the block that is due is dropped."""
        for block in blocks:
            live = self.holds(block.session)
            if live is None or not live.writing or block.generated != live.transcript.generated:
                continue
            if step_fits(block.step, live.params.block_size, self._limits.vocab_size):
                live.show(step_from_pb(block.step))

    def _checked(self, live: LiveSession, block: link_pb2.BlockDone) -> Sequence[TokenLogprob]:
        """The block's logprobs, if asked for; of a draft none. Raises Incompatible if it is not the block that is due."""
        generated, params = live.transcript.generated, live.params
        if not live.writing:
            raise Incompatible("done.session: a block that is not due")
        if block.generated != generated:
            raise Incompatible(f"done.generated: {block.generated}, the session has {generated}")
        if len(block.token_ids) != params.block_size:
            raise Incompatible(f"done.token_ids: {len(block.token_ids)} tokens in a block of {params.block_size}")
        vocab = self._limits.vocab_size
        if any(not 0 <= token < vocab for token in block.token_ids):
            raise Incompatible(f"done.token_ids: a token is outside the vocabulary [0, {vocab})")
        if live.effort is not None and block.token_ids[0] != live.last_token:
            raise Incompatible(f"done.token_ids: the draft begins with {block.token_ids[0]}, not with {live.last_token}")
        logprobs = logprobs_from_pb(block.logprobs)
        check_logprobs(logprobs, params.block_size, None if live.effort is not None else params.logprobs, vocab)
        return logprobs


def _ref(live: LiveSession) -> link_pb2.SessionRef:
    return link_pb2.SessionRef(id=live.id, lease=live.lease)
