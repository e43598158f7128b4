"""One session on a worker, from attach to detach."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from typing import Any

import grpc
from torch import Tensor

from twotower.broker.ready_queue import ReadySession
from twotower.denoiser.loop import DenoiserLoop, Finish
from twotower.engine.refinement import Refinement
from twotower.errors import Incompatible, NonFiniteLogits
from twotower.model.checkpoint import Checkpoint
from twotower.model.state import ContextState, Extension
from twotower.request import GenerationParams
from twotower.tracing.recorder import transfer
from twotower.transport.ends import WorkerTransports
from twotower.transport.interface import Arrival, Inlet
from twotower.transport.layout import off_loop
from twotower.v1 import context_pb2, context_pb2_grpc
from twotower.wire.handshake import make_hello
from twotower.wire.logprobs import logprobs_to_pb
from twotower.wire.params import params_from_pb
from twotower.wire.state import delta_from, delta_spec, fill_state, state_spec

LEAVE_S = 1.0
"""How long a call that is over may take to end."""


class Attachment:
    """Receives the state once, then refines block after block and applies the delta of each."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        loop: DenoiserLoop,
        worker_id: str,
        state: ContextState,
        transports: WorkerTransports,
    ) -> None:
        """state: to be filled; the caller's again when `run` has ended and the loop has settled."""
        self._state = state
        self._checkpoint = checkpoint
        self._loop = loop
        self._worker_id = worker_id
        self._transports = transports
        self._context = ""
        self._params = GenerationParams()
        self._rates: Mapping[int, Tensor] = {}

    async def run(self, channel: grpc.aio.Channel, ready: ReadySession, attached: asyncio.Event, drain: asyncio.Event) -> None:
        """Attach and work until the session ends here, or until the block after `drain` is set.

        Sets `attached` once the context has taken this worker. Raises grpc.aio.AioRpcError when the context
        refuses or goes away, Incompatible when what it sends does not fit.
        """
        self._context = ready.context_address
        call = context_pb2_grpc.ContextTowerStub(channel).Attach()
        try:
            await self._work(call, ready, attached, drain)
            await self._leave(call)
        finally:
            self._loop.forget(self._state)
            call.cancel()  # nothing is left open, whatever happened; no effect on a call that is over

    async def _leave(self, call: Any) -> None:
        """Let the context end the call, as it is about to: cancelled in the middle of that, it would log an error."""
        with contextlib.suppress(TimeoutError, grpc.aio.AioRpcError):
            async with asyncio.timeout(LEAVE_S):
                while await self._read(call) is not None:
                    pass

    async def _work(self, call: Any, ready: ReadySession, attached: asyncio.Event, drain: asyncio.Event) -> None:
        tower = self._loop.engine.tower
        hello = make_hello(
            self._checkpoint.identity,
            tower.dtype,
            self._worker_id,
            ready.session_id,
            ready.lease,
            self._transports.offer,
        )
        await call.write(context_pb2.WorkerMessage(hello=hello))
        self._loop.expect(self._state)
        first = await self._read(call)
        if first is None:
            return
        if not first.HasField("attached"):
            raise Incompatible("message: expected attached")
        attached.set()
        self._params = params_from_pb(first.attached.params)
        self._check_room(first.attached.length, ready, "attached.length")
        inlet = self._transports.attach(first.attached.transport, ready.context_address)
        try:
            await self._serve(call, inlet, ready, first.attached.length, drain)
        finally:
            await inlet.close()

    async def _serve(self, call: Any, inlet: Inlet, ready: ReadySession, length: int, drain: asyncio.Event) -> None:
        """From the state of `length` tokens to the session's end."""
        state = self._state
        tracer, spec = self._loop.tracer, state_spec(self._checkpoint.config, state.dtype, length)
        with transfer(tracer, "receive state", ready.session_id) as span, inlet.expect(spec, state.device) as arrival:
            span.set_attribute("bytes", arrival.size)
            refine = await self._collect(call, arrival)
            if refine is None:
                return
            tensors = await arrival.tensors()
            fill = lambda: self._loop.known_rates(fill_state(state, tensors, length))  # noqa: E731
            self._rates = await off_loop(arrival.size, state.device, fill)
        while refine is not None:
            if refine.length != state.length:
                raise Incompatible(f"refine.length: {refine.length}, the state here has {state.length}")
            self._check_room(state.length + self._params.block_size, ready, "refine.length")
            refine = await self._block(call, inlet, ready.session_id, refine, drain)

    @staticmethod
    def _check_room(tokens: int, ready: ReadySession, field: str) -> None:
        if tokens > ready.tokens:
            raise Incompatible(f"{field}: the state would hold {tokens} tokens, {ready.tokens} were announced")

    async def _block(
        self, call: Any, inlet: Inlet, session_id: str, refine: context_pb2.Refine, drain: asyncio.Event
    ) -> context_pb2.Refine | None:
        """Refine a block, hand it in, apply the delta. None when the session is over here."""
        state = self._state
        block = self._loop.engine.start(self._params, state, refine.generated)
        # The context is silent during the steps, unless the session ends.
        answer = asyncio.create_task(self._read(call))
        try:
            finish = await self._refine(call, block, answer)
            if finish is None:
                return None
            done = context_pb2.BlockDone(
                generated=refine.generated,
                token_ids=block.tokens.tolist(),
                forwards=block.forwards,
                logprobs=logprobs_to_pb(block.logprobs),
                forward=finish.forward,
                together=finish.together,
            )
            waiting = transfer(self._loop.tracer, "await delta", session_id)
            await call.write(context_pb2.WorkerMessage(block_done=done))
            if drain.is_set():
                await call.done_writing()  # handed back at the block's border
            first = await answer
        finally:
            answer.cancel()
            answer.add_done_callback(_retrieve)
        config, size = self._checkpoint.config, self._params.block_size
        with inlet.expect(delta_spec(config, state.dtype, size), state.device) as arrival:
            following = await self._collect(call, arrival, first)
            if following is None or drain.is_set():
                return None
            delta = delta_from(await arrival.tensors(), config, size)
            waiting.set_attribute("bytes", arrival.size)
            waiting.end()
            extension = Extension(state, delta, self._rates)
            await self._loop.apply(extension, (self._context, following.commit), following.together)
        return following

    async def _refine(self, call: Any, block: Refinement, answer: asyncio.Task[Any]) -> Finish | None:
        """Run the block's steps; None if the session ended meanwhile, or failed here."""
        refining = asyncio.create_task(self._loop.refine(block, self._context))
        try:
            await asyncio.wait((refining, answer), return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            refining.cancel()  # or it would go on with a state that is no longer this session's
            raise
        if answer.done():
            refining.cancel()
            await asyncio.wait((refining,))
            answer.result()  # the session ended, or the call broke
            return None
        error = refining.exception()
        if error is None:
            return refining.result()
        if not isinstance(error, NonFiniteLogits):
            raise error  # this worker's failure, not the request's: the context queues the session again
        await call.write(context_pb2.WorkerMessage(failed=context_pb2.Failed(reason=str(error))))
        await answer
        return None

    async def _collect(
        self, call: Any, arrival: Arrival, message: context_pb2.ContextMessage | None = None
    ) -> context_pb2.Refine | None:
        """Take in tensors until the context asks for a block; None if the session ends instead."""
        message = message or await self._read(call)
        while message is not None and await arrival.add(message):
            message = await self._read(call)
        if message is None or message.HasField("end"):
            return None
        if not message.HasField("refine"):
            raise Incompatible("message: expected tensors, refine or end")
        return message.refine

    @staticmethod
    async def _read(call: Any) -> context_pb2.ContextMessage | None:
        """The next message, or None at the end of the call. Raises grpc.aio.AioRpcError."""
        message = await call.read()
        return None if message is grpc.aio.EOF else message  # type: ignore[attr-defined]  # absent from the stubs


def _retrieve(task: asyncio.Task[Any]) -> None:
    """What a read raised has been told by the write that broke with it."""
    if not task.cancelled():
        task.exception()
