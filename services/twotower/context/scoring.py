"""The context's `Scoring` service: prompts in, log probabilities of their tokens out."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from twotower.context.messages import CloseSession, ContextEntry, ScoreTokens
from twotower.engine.inbox import Inbox
from twotower.errors import Draining, InvalidArgument, TwoTowerError
from twotower.internal.v1 import scoring_pb2, scoring_pb2_grpc
from twotower.model.pool import PAGE, StatePool
from twotower.request import MAX_LOGPROBS, ModelLimits, Priority, TokenLogprob
from twotower.wire.logprobs import logprobs_to_pb


class ScoringService(scoring_pb2_grpc.ScoringServicer):
    """Checks prompts, hands them to the loop, and passes on what it finds."""

    def __init__(
        self, inbox: Inbox[ContextEntry | None], limits: ModelLimits, pool: StatePool, draining: Callable[[], bool]
    ) -> None:
        """`draining`: whether this context takes nothing new."""
        self._inbox = inbox
        self._limits = limits
        self._pool = pool
        self._draining = draining

    async def Score(self, request: scoring_pb2.ScoreRequest, context: Any) -> AsyncIterator[scoring_pb2.ScoredTokens]:
        """Log probabilities of all tokens but the first. Ending the call ends the work."""
        if self._draining():
            raise Draining("this context is draining")
        tokens, name = list(request.prompt.ids), uuid.uuid4().hex
        self._check(tokens, request.top)
        found: asyncio.Queue[Sequence[TokenLogprob] | TwoTowerError] = asyncio.Queue()
        soon = asyncio.get_running_loop().call_soon_threadsafe
        self._inbox.put(ScoreTokens(name, tokens, request.top, Priority.NORMAL, lambda result: soon(found.put_nowait, result)))
        missing = len(tokens) - 1
        try:
            while missing:
                result = await found.get()
                if isinstance(result, TwoTowerError):
                    raise result
                missing -= len(result)
                yield scoring_pb2.ScoredTokens(logprobs=logprobs_to_pb(result))
        finally:
            self._inbox.put(CloseSession(name))

    def _check(self, tokens: Sequence[int], top: int) -> None:
        """Raise InvalidArgument for what cannot be scored."""
        if not tokens:
            raise InvalidArgument("prompt", "is empty; at least one token is needed")
        if any(not 0 <= token < self._limits.vocab_size for token in tokens):
            raise InvalidArgument("prompt", f"a token is outside the vocabulary [0, {self._limits.vocab_size})")
        if len(tokens) > self._limits.max_context:
            raise InvalidArgument("prompt", f"{len(tokens)} tokens exceed the context of {self._limits.max_context}")
        if not 0 <= top <= MAX_LOGPROBS:
            raise InvalidArgument("logprobs", f"must be in [0, {MAX_LOGPROBS}], not {top}")
        if not self._pool.ever_fits(len(tokens)):
            raise InvalidArgument(
                "prompt", f"takes {len(tokens)} tokens of state memory, of {self._pool.size.pages * PAGE} in all"
            )
