"""One request's session, wherever it lives: opened on a context, and opened again on another one if that dies."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass

import grpc

from twotower.errors import BrokerUnavailable, DeadlineExceeded, Draining, Overloaded, RequestFailed, TwoTowerError, Unavailable
from twotower.gateway.prefixes import PromptChains
from twotower.gateway.replicas import ContextReplica, ReplicaPool
from twotower.internal.v1 import context_pb2
from twotower.request import BlockStep, FinishReason, GenerationParams, Priority
from twotower.rpc.errors import error_from_rpc, raised_by_peer
from twotower.v1 import inference_pb2
from twotower.wire.params import FINISH_FROM_PB, PRIORITY_TO_PB, params_to_pb
from twotower.wire.steps import step_from_pb

log = logging.getLogger(__name__)

SessionEvent = context_pb2.SessionBlock | BlockStep | FinishReason

MAX_FAILURES = 4
"""Failures of the request in a row, without a block between them, that end it; the contexts count on from these."""
MAX_LOSSES = 20
"""As `MAX_FAILURES`, for contexts that were lost for whatever reason."""
QUICK_S = 1.0
"""A context that is lost so soon after it was given a request may have been lost to the request; one that is lost later, or
that was never reached, was not."""
BACKOFF_S = 0.1

LOST_CODES = frozenset(
    {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED, grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN}
)
"""What gRPC itself says when the other side dies in the middle of a call."""


@dataclass(frozen=True, slots=True)
class Job:
    """A checked request with nothing left open."""

    request_id: str
    prompt: tuple[int, ...]
    params: GenerationParams
    priority: Priority = Priority.NORMAL


class _LostError(Exception):
    """The session ended with its context; it can go on elsewhere."""

    def __init__(self, why: str, *, suspect: bool = True) -> None:
        """suspect: whether the request may be the reason."""
        super().__init__(why)
        self.suspect = suspect


class SessionStream:
    """Streams a job's blocks, each exactly once, across the deaths of contexts."""

    def __init__(
        self,
        pool: ReplicaPool,
        job: Job,
        *,
        wait_s: float,
        deadline: float | None,
        on_open: Callable[[int], object],
        on_reopen: Callable[[], object],
    ) -> None:
        """`wait_s`: how long to wait for another context. `deadline`: by the loop's clock.

        `on_open` takes how many tokens of the prompt the chosen context is expected to hold.
        """
        self._pool = pool
        self._job = job
        self._chains = PromptChains(job.prompt)
        self._wait_s = wait_s
        self._deadline = deadline
        self._on_open = on_open
        self._on_reopen = on_reopen
        self._emitted: list[int] = []
        self._rounds: list[int] = []
        """In speculative mode, how these became part of the state: see `OpenRequest.rounds`."""
        self._failures = 0
        """Since the last block,"""
        self._losses = 0
        """and contexts that were lost since then, whatever the reason."""
        self._full: set[ContextReplica] = set()

    async def events(self) -> AsyncGenerator[SessionEvent, None]:
        """Blocks, then why the session ended. Closing this generator ends the session. Raises TwoTowerError."""
        clock = asyncio.get_running_loop().time
        give_up = 0.0
        while True:
            replica = await self._replica()
            try:
                async with aclosing(self._attempt(replica)) as events:
                    async for event in events:
                        yield event
                        if isinstance(event, FinishReason):
                            return
                raise _LostError("it ended the stream too early")
            except Draining:
                self._pool.pass_over(replica)  # the request had no part in it
            except Overloaded as error:
                self._full.add(replica)
                if self._pool.pick(self._full) is None:
                    if clock() >= give_up:
                        raise
                    # It was admitted once, and lost its place by no fault of its own: room is waited for.
                    self._full.clear()
                    await self._sleep(BACKOFF_S)
                    continue
                log.info("request %s: %s; trying another context", self._job.request_id, error)
            except _LostError as lost:
                self._failures += lost.suspect
                self._losses += 1
                self._full.clear()  # that was when the session was opened
                if (reason := self._complete()) is not None:  # only the last message was lost
                    yield reason
                    return
                if self._failures >= MAX_FAILURES:
                    times = f"{self._failures} times without a block between"
                    raise RequestFailed(f"the request failed {times}; the last time: {lost}") from None
                if self._losses >= MAX_LOSSES:
                    raise Unavailable(f"{self._losses} contexts were lost one after the other; the last time: {lost}") from None
                log.warning("request %s: context %s was lost (%s)", self._job.request_id, replica.address, lost)
                self._on_reopen()
                give_up = clock() + self._wait_s
                await self._sleep(BACKOFF_S * 2 ** min(self._losses - 1, 4))

    async def _replica(self) -> ContextReplica:
        clock = asyncio.get_running_loop().time
        give_up = clock() + self._wait_s
        while (replica := self._pool.pick(self._full, self._chains)) is None:
            if clock() >= give_up:
                raise Unavailable(f"no context replica became available within {self._wait_s:.0f} s")
            await self._sleep(BACKOFF_S)
        self._on_open(self._pool.expected_tokens(replica, self._chains))
        self._pool.sent(replica, self._chains)
        return replica

    async def _sleep(self, seconds: float) -> None:
        """Sleep, but not beyond the deadline. Raises DeadlineExceeded."""
        if self._deadline is not None:
            left = self._deadline - asyncio.get_running_loop().time()
            if left < seconds:
                await asyncio.sleep(max(0.0, left))
                raise DeadlineExceeded("the deadline passed before the answer came")
        await asyncio.sleep(seconds)

    async def _attempt(self, replica: ContextReplica) -> AsyncGenerator[SessionEvent, None]:
        """The session on one context. Raises _LostError, or the error it ended with."""
        job = self._job
        request = context_pb2.OpenRequest(
            request_id=job.request_id,
            prompt=inference_pb2.TokenIds(ids=(*job.prompt, *self._emitted)),
            generated=len(self._emitted),
            params=params_to_pb(job.params),
            priority=PRIORITY_TO_PB[job.priority],
            rounds=self._rounds,
            failures=self._failures,
        )
        timeout = None if self._deadline is None else max(0.0, self._deadline - asyncio.get_running_loop().time())
        replica.in_flight += 1
        opened = asyncio.get_running_loop().time()
        call = replica.stub.Open(request, timeout=timeout)
        finish: FinishReason | None = None
        try:
            async for event in call:
                if event.HasField("step"):
                    yield step_from_pb(event.step)
                elif event.HasField("end"):
                    finish = FINISH_FROM_PB.get(event.end.finish_reason, FinishReason.LENGTH)
                else:
                    self._emitted.extend(event.block.token_ids)
                    if event.block.draft.context_forwards:
                        self._rounds.append(len(event.block.token_ids) if event.block.draft.drafted else 0)
                    self._failures = self._losses = 0
                    yield event.block
        except grpc.aio.AioRpcError as rpc:
            if finish is None:
                raise self._judge(replica, rpc, asyncio.get_running_loop().time() - opened) from None
        finally:
            replica.in_flight -= 1
            call.cancel()
        if finish is not None:  # after the end of the call: if it were cancelled before, the context would log an error
            yield finish

    def _judge(self, replica: ContextReplica, rpc: grpc.aio.AioRpcError, held_s: float) -> TwoTowerError | _LostError:
        """What the end of a call means, `held_s` after it began."""
        error = error_from_rpc(rpc)
        if not raised_by_peer(rpc) and rpc.code() in LOST_CODES:
            replica.lose()
            reached = "failed to connect" not in str(rpc.details())
            return _LostError(str(error), suspect=reached and held_s < QUICK_S)
        # Redis is the same for all contexts, and one that drains has not tried the request.
        if isinstance(error, Unavailable) and not isinstance(error, BrokerUnavailable | Draining):
            self._pool.pass_over(replica)
            return _LostError(str(error))
        return error

    def _complete(self) -> FinishReason | None:
        """Why the generation is over, if what was emitted already says so."""
        params = self._job.params
        if self._emitted and self._emitted[-1] in params.eos_token_ids:
            return FinishReason.STOP
        return FinishReason.LENGTH if len(self._emitted) >= params.max_tokens else None
