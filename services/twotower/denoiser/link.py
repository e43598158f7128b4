"""A worker's end of the link to one context: one stream for all the sessions that it holds of it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grpc
from opentelemetry.trace import Span, Tracer

from twotower.broker.ready_queue import ReadySession
from twotower.denoiser.messages import Begin, BlocksFinished, BlocksShown, Draft, Extend, Held, Row
from twotower.denoiser.sickness import FinishedBlock
from twotower.engine.refinement import Refinement
from twotower.errors import Incompatible, NonFiniteLogits, TwoTowerError
from twotower.internal.v1 import context_pb2_grpc, link_pb2
from twotower.rpc.channel import open_channel
from twotower.rpc.errors import error_from_rpc
from twotower.tasks import end_tasks
from twotower.tracing.recorder import transfer
from twotower.transport.interface import Inlet, Received
from twotower.wire.frames import Key, Spec
from twotower.wire.handshake import make_hello
from twotower.wire.logprobs import logprobs_to_pb
from twotower.wire.params import params_from_pb
from twotower.wire.state import delta_spec, state_spec
from twotower.wire.steps import step_to_pb

if TYPE_CHECKING:
    from twotower.denoiser.worker import Worker

log = logging.getLogger(__name__)

HANDED_BACK = "handed back at a block border"


@dataclass(slots=True)
class _Session:
    """A session that this worker holds of the context."""

    ready: ReadySession
    awaited: Span
    """From the attachment to its state, or from a finished block to its delta."""
    refining: bool = False
    """Its block is under way here; not: its state or a delta is on its way."""
    since: float = 0.0
    """When its block was started, or handed in, by the event loop's clock."""
    last: tuple[int, ...] = ()
    """Tokens of its last block."""


class ContextLink:
    """Opened for the first session of a context that is pulled, and kept until either end goes."""

    def __init__(self, worker: Worker, address: str, tracer: Tracer) -> None:
        self._worker, self._address, self._tracer = worker, address, tracer
        self._outgoing: asyncio.Queue[link_pb2.WorkerMessage | None] = asyncio.Queue()
        """None: no more will be sent."""
        self._sessions: dict[Held, _Session] = {}
        self._sent = 0.0
        """When something was last sent."""
        self._says_arrived = False
        self.closed = False

    @property
    def refining(self) -> int:
        """Blocks under way here."""
        return sum(session.refining for session in list(self._sessions.values()))

    # What Worker asks for. Nothing here waits.

    def attach(self, held: Held, ready: ReadySession) -> None:
        """Ask for a session that was pulled off the queue."""
        self._sessions[held] = _Session(ready, transfer(self._tracer, "receive state", held.session_id))
        self._put(link_pb2.WorkerMessage(attach=link_pb2.Attach(sessions=[_ref(held)])))

    def refuse(self, held: Held, why: str) -> None:
        """Give back a session that was pulled off the queue and can never be served here."""
        self._put(link_pb2.WorkerMessage(attach=link_pb2.Attach(sessions=[_ref(held)])))
        detached = link_pb2.Detached(session=_ref(held), reason=link_pb2.DETACH_REASON_FAILED, detail=why)
        self._put(link_pb2.WorkerMessage(detach=link_pb2.Detach(sessions=[detached])))

    def hand_in(self, finished: BlocksFinished) -> None:
        """Send the blocks that one forward finished, of those sessions that are still here."""
        done = link_pb2.BlocksDone()
        for held, block in finished.blocks:
            session = self._sessions.get(held)
            if session is None:
                continue
            self._count(session, block)
            session.refining = False
            session.awaited = transfer(self._tracer, "await delta", held.session_id)
            done.blocks.add(
                session=_ref(held),
                generated=block.generated,
                token_ids=block.tokens.tolist(),
                forwards=block.forwards,
                seconds=block.seconds,
                logprobs=logprobs_to_pb(block.logprobs),
            )
        if done.blocks:
            self._put(link_pb2.WorkerMessage(done=done))

    def show(self, shown: BlocksShown) -> None:
        """Send blocks on their way, of those sessions that are still here."""
        stepped = link_pb2.BlocksStepped()
        for held, generated, step in shown.blocks:
            if held in self._sessions:
                stepped.blocks.add(session=_ref(held), generated=generated, step=step_to_pb(step))
        if stepped.blocks:
            self._put(link_pb2.WorkerMessage(stepped=stepped))

    def hand_back(self) -> None:
        """Let go of every session whose block is not under way here: the context has all that it needs."""
        held = [held for held, session in self._sessions.items() if not session.refining]
        self._detach([(one, link_pb2.DETACH_REASON_HANDED_BACK, HANDED_BACK) for one in held])
        self._worker.metrics.leave("handed_back", len(held))
        self._worker.leave(held)

    def fail(self, held: Held, error: Exception) -> None:
        """A session cannot go on here; its slot is free."""
        self._worker.metrics.leave("not_finite" if isinstance(error, NonFiniteLogits) else "failed")
        if isinstance(error, NonFiniteLogits):
            self._detach([(held, link_pb2.DETACH_REASON_NOT_FINITE, str(error))])
        else:
            self._detach([(held, link_pb2.DETACH_REASON_FAILED, "the denoiser failed on this request")])

    def close(self) -> None:
        """End the stream once everything is sent."""
        self._outgoing.put_nowait(None)

    def _count(self, session: _Session, block: Refinement) -> None:
        now, tokens = asyncio.get_running_loop().time(), tuple(block.tokens.tolist())
        repeats, gamma = tokens == session.last, block.params.gamma
        finished = FinishedBlock(len(tokens), block.forwards, block.steps, gamma, repeats, block.draft)
        self._worker.metrics.finished(finished, now - session.since, block.seconds)
        session.since, session.last = now, tokens

    def _started(self, session: _Session) -> None:
        session.refining, session.since = True, asyncio.get_running_loop().time()

    def _detach(self, leaving: Iterable[tuple[Held, link_pb2.DetachReason.ValueType, str]]) -> None:
        detach = link_pb2.Detach()
        for held, reason, detail in leaving:
            if self._sessions.pop(held, None) is not None:
                detach.sessions.add(session=_ref(held), reason=reason, detail=detail)
        if detach.sessions:
            self._put(link_pb2.WorkerMessage(detach=detach))

    def _put(self, message: link_pb2.WorkerMessage) -> None:
        self._sent = asyncio.get_running_loop().time()
        self._outgoing.put_nowait(message)

    # The stream

    async def run(self) -> None:
        """Until the link ends, however it ends; its sessions have left then."""
        try:
            async with self._worker.dial(self._address) as call:
                await self._run(call)
        except grpc.aio.AioRpcError as rpc:
            log.warning("the link to context %s broke: %s", self._address, error_from_rpc(rpc))
        except asyncio.InvalidStateError:  # gRPC's for a message that is written when the call has ended already
            log.warning("the link to context %s broke while something was sent", self._address)
        except TwoTowerError as error:
            log.error("the link to context %s is given up: %s", self._address, error)
        finally:
            self.closed = True
            held = list(self._sessions)
            self._worker.metrics.leave("link_lost", len(held))
            self._sessions.clear()
            self._worker.leave(held)

    async def _run(self, call: Any) -> None:
        hello = make_hello(self._worker.identity, self._worker.dtype, self._worker.id, self._worker.transports.offer)
        await call.write(link_pb2.WorkerMessage(hello=hello))
        first = await _read(call)
        if first is None or not first.HasField("welcome"):
            raise Incompatible("message: expected welcome")
        inlet = self._worker.transports.attach(first.welcome.transport, self._address)
        self._says_arrived = first.welcome.say_arrived
        alive = asyncio.create_task(self._say_alive(first.welcome.silence_s / 4))
        sending, receiving = asyncio.create_task(self._send(call)), asyncio.create_task(self._receive(call, inlet))
        try:
            # Whatever fails ends the link; that nothing more is to be sent does not.
            done, _ = await asyncio.wait((alive, sending, receiving), return_when=asyncio.FIRST_EXCEPTION)
            for task in done:
                task.result()
        finally:
            self.closed = True
            await end_tasks(alive, sending, receiving)
            await inlet.close()

    async def _send(self, call: Any) -> None:
        while (message := await self._outgoing.get()) is not None:
            await call.write(message)
        await call.done_writing()

    async def _say_alive(self, every_s: float) -> None:
        """While the engine makes progress: a worker that hangs is silent, and loses its sessions."""
        clock = asyncio.get_running_loop().time
        while True:
            await asyncio.sleep(every_s)
            progress = self._worker.progress
            if not progress.overdue_s and clock() - self._sent >= every_s:
                self._put(link_pb2.WorkerMessage(alive=link_pb2.Alive(forwards=progress.forwards)))

    async def _receive(self, call: Any, inlet: Inlet) -> None:
        while (message := await _read(call)) is not None:
            match message.WhichOneof("message"):
                case "state":
                    await self._take_state(call, inlet, message.state)
                    self._say_arrived()
                case "committed":
                    await self._take_committed(call, inlet, message.committed)
                    self._say_arrived()
                case "ended":
                    held = [_held(ended.session) for ended in message.ended.sessions]
                    here = [one for one in held if self._sessions.pop(one, None) is not None]
                    self._worker.metrics.leave("ended", len(here))
                    self._worker.leave(here)
                case other:
                    raise Incompatible(f"message: {other or 'an empty one'} is not expected here")

    def _say_arrived(self) -> None:
        if self._says_arrived:
            self._put(link_pb2.WorkerMessage(arrived=link_pb2.Arrived()))

    async def _take_state(self, call: Any, inlet: Inlet, state: link_pb2.State) -> None:
        held = _held(state.session)
        draft = _draft(state, self._worker.config.vocab_size)
        placed = state.tensors if state.HasField("tensors") else None
        expected = state_spec(self._worker.config, self._worker.dtype, state.length)
        received = await self._received("state", inlet, placed, expected, call)
        session = self._sessions.get(held)
        if session is None:  # it has left
            received.release()
            return
        params = params_from_pb(state.params)
        if state.length + params.block_size > session.ready.tokens:
            raise Incompatible(f"state.length: {state.length} tokens and a block, where {session.ready.tokens} were announced")
        session.awaited.set_attribute("bytes", received.size)
        session.awaited.end()
        self._started(session)
        begin = Begin(held, self._address, params, session.ready.tokens, state.length, state.generated, received, draft)
        self._worker.loop.inbox.put(begin)

    async def _take_committed(self, call: Any, inlet: Inlet, committed: link_pb2.BlocksCommitted) -> None:
        placed = committed.tensors if committed.HasField("tensors") else None
        size, rows = committed.block_size, committed.rows
        if any(not 1 <= row.kept <= size for row in rows):
            raise Incompatible(f"committed.kept: must be in [1, {size}], the positions of the tensors")
        vocab = self._worker.config.vocab_size
        own = [Row(_held(row.session), row.length, row.generated, row.kept, _draft(row, vocab)) for row in rows]
        expected = delta_spec(self._worker.config, self._worker.dtype, len(rows), size)
        received = await self._received("commit", inlet, placed, expected, call)
        now = asyncio.get_running_loop().time()
        for row in rows:
            session = self._sessions.get(_held(row.session))
            if session is not None:
                session.awaited.set_attribute("bytes", received.size // len(rows))
                session.awaited.end()
                self._worker.metrics.committed(now - session.since)
                self._started(session)
        self._worker.loop.inbox.put(Extend(own, size, received))

    async def _received(
        self, what: str, inlet: Inlet, placed: link_pb2.Placed | None, expected: Mapping[Key, Spec], call: Any
    ) -> Received:
        clock = asyncio.get_running_loop().time
        began = clock()
        received = await inlet.receive(placed, expected, self._worker.device, lambda: _read(call))
        self._worker.metrics.received(inlet.kind.value, what, received.size, clock() - began)
        return received


@asynccontextmanager
async def dial(address: str) -> AsyncIterator[Any]:
    """A call of `Link` at a context, which is over when left."""
    channel = open_channel(address)
    call: Any = context_pb2_grpc.ContextTowerStub(channel).Link()
    try:
        yield call
    finally:
        call.cancel()  # no effect on a call that is over
        await channel.close(None)


async def _read(call: Any) -> link_pb2.ContextMessage | None:
    """The next message, or None at the end of the call. Raises grpc.aio.AioRpcError."""
    message = await call.read()
    return None if message is grpc.aio.EOF else message  # type: ignore[attr-defined]  # absent from the stubs


def _ref(held: Held) -> link_pb2.SessionRef:
    return link_pb2.SessionRef(id=held.session_id, lease=held.lease)


def _held(ref: link_pb2.SessionRef) -> Held:
    return Held(ref.id, ref.lease)


def _draft(message: link_pb2.State | link_pb2.CommittedBlock, vocab: int) -> Draft | None:
    """What is known of the next block, if that is a draft. Raises Incompatible."""
    if not message.HasField("draft"):
        return None
    draft = message.draft
    if not 0 <= draft.token < vocab:
        raise Incompatible(f"draft.token: {draft.token} is outside the vocabulary [0, {vocab})")
    if draft.steps < 1:
        raise Incompatible(f"draft.steps: must be at least 1, not {draft.steps}")
    return Draft(draft.token, draft.steps)
