"""The context's gRPC face: `Open` for gateways, `Link` for denoiser workers."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from typing import Any

from opentelemetry.trace import Tracer

from twotower.context.link import WorkerLink
from twotower.context.live import LiveSession, ShownBlock
from twotower.context.sessions import Sessions
from twotower.engine.session import block_tokens
from twotower.errors import Draining, Incompatible, InvalidArgument, TwoTowerError
from twotower.internal.v1 import context_pb2, context_pb2_grpc, link_pb2
from twotower.model.checkpoint import Checkpoint
from twotower.model.pool import PAGE, StatePool
from twotower.request import BlockStep, FinishReason, Mode, Priority, check_request
from twotower.transport.ends import ContextTransports
from twotower.wire.handshake import check_hello
from twotower.wire.logprobs import logprobs_to_pb
from twotower.wire.params import FINISH_TO_PB, PRIORITY_FROM_PB, draft_use_to_pb, params_from_pb
from twotower.wire.steps import step_to_pb


class ContextService(context_pb2_grpc.ContextTowerServicer):
    """Checks what comes in, and turns messages into calls of `Sessions`, and back."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        sessions: Sessions,
        pool: StatePool,
        transports: ContextTransports,
        tracer: Tracer,
        silence_s: float,
        *,
        paced: bool = False,
    ) -> None:
        """silence_s: a worker that says nothing for longer loses its sessions. paced: towers take turns on the cores."""
        self._paced = paced
        self._checkpoint = checkpoint
        self.sessions = sessions
        self._pool = pool
        self._transports = transports
        self._tracer = tracer
        self._silence_s = silence_s
        self.draining = False

    async def Open(self, request: context_pb2.OpenRequest, context: Any) -> AsyncIterator[context_pb2.SessionEvent]:
        """A gateway's session: blocks as they are finished. Ending the call ends it."""
        if self.draining:
            raise Draining("this context is draining")
        live, tokens = self._checked(request)
        self.sessions.open(live, tokens, request.rounds)
        try:
            while True:
                event = await live.next_event()
                self.sessions.has_read(live)
                if isinstance(event, TwoTowerError):
                    raise event
                if isinstance(event, FinishReason):
                    self.sessions.end(live)
                    yield context_pb2.SessionEvent(end=context_pb2.SessionEnd(finish_reason=FINISH_TO_PB[event]))
                    return
                if isinstance(event, BlockStep):
                    yield context_pb2.SessionEvent(step=step_to_pb(event))
                    continue
                yield context_pb2.SessionEvent(block=_block_to_pb(event))
        finally:
            self.sessions.end(live)

    async def Link(self, requests: AsyncIterator[link_pb2.WorkerMessage], context: Any) -> None:
        """A worker's sessions, for as long as both live."""

        async def read() -> link_pb2.WorkerMessage | None:
            return await anext(requests, None)

        first = await read()
        if first is None or not first.HasField("hello"):
            raise Incompatible("message: the first one must be hello")
        hello = first.hello
        check_hello(hello, self._checkpoint.identity, self._pool.dtype)
        outlet, choice = self._transports.attach(hello.transport, context.peer())
        try:
            welcome = link_pb2.Welcome(transport=choice, silence_s=self._silence_s, say_arrived=self._paced)
            await context.write(link_pb2.ContextMessage(welcome=welcome))
            limits = self._checkpoint.limits
            link = WorkerLink(
                self.sessions, hello.worker_id, outlet, limits, self._tracer, self._silence_s, says_arrived=self._paced
            )
            await link.run(read, context.write)
        finally:
            await outlet.close()

    def _checked(self, request: context_pb2.OpenRequest) -> tuple[LiveSession, list[int]]:
        """A session, and all tokens that are known of it. Raises InvalidArgument."""
        params, tokens, generated = params_from_pb(request.params), list(request.prompt.ids), request.generated
        if not 0 <= generated < max(len(tokens), 1):
            raise InvalidArgument("generated", f"must be in [0, {len(tokens)}), not {generated}")
        check_request(tokens[: len(tokens) - generated], params, self._checkpoint.limits)
        if generated >= params.max_tokens:
            raise InvalidArgument("generated", f"{generated} tokens leave none of max_tokens {params.max_tokens}")
        if generated % block_tokens(params):
            raise InvalidArgument("generated", f"must be whole blocks of {block_tokens(params)} tokens, not {generated}")
        rounds = request.rounds
        if rounds and (params.mode is not Mode.SPECULATIVE or sum(max(n, 1) for n in rounds) != generated - 1):
            raise InvalidArgument("rounds", f"do not make the {generated} tokens that were generated")
        if any(not 0 <= n <= params.block_size for n in rounds):
            raise InvalidArgument("rounds", f"must be in [0, {params.block_size}] each")
        priority = PRIORITY_FROM_PB.get(request.priority, Priority.NORMAL)
        live = LiveSession(
            uuid.uuid4().hex,
            len(tokens),
            params,
            priority,
            generated=generated,
            failures=max(0, request.failures),
            last_token=tokens[-1] if generated else None,
            times=self.sessions.times,
        )
        if not self._pool.ever_fits(live.room):
            most = self._pool.size.pages * PAGE
            raise InvalidArgument(
                "max_tokens", f"prompt and completion take {live.room} tokens of state memory, of {most} in all"
            )
        return live, tokens


def _block_to_pb(block: ShownBlock) -> context_pb2.SessionBlock:
    return context_pb2.SessionBlock(
        token_ids=block.tokens,
        forwards=block.forwards,
        logprobs=logprobs_to_pb(block.logprobs),
        draft=draft_use_to_pb(block.use),
    )
