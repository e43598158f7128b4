"""Log probabilities of prompts, from whichever context is there: a reading that breaks begins again on another."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

import grpc

from twotower.errors import DeadlineExceeded, Draining, Overloaded, TwoTowerError, Unavailable
from twotower.gateway.metrics import COMPLETED, Metrics, outcome_of
from twotower.gateway.replicas import ContextReplica, ReplicaPool
from twotower.gateway.sessions import LOST_CODES, MAX_FAILURES, Job
from twotower.internal.v1 import scoring_pb2
from twotower.request import TokenLogprob
from twotower.rpc.errors import error_from_rpc, raised_by_peer
from twotower.v1 import inference_pb2
from twotower.wire.logprobs import logprobs_from_pb

log = logging.getLogger(__name__)

TOGETHER = 16
"""Prompts of one call that are read at a time: as many as share a forward, and some that are on their way."""

LABEL = "score"
"""The mode under which prompts are counted."""

PromptScores = Sequence[TokenLogprob | None]
"""One for each token of a prompt; None for the first, which nothing comes before."""


class Scorer:
    """Asks contexts."""

    def __init__(self, pool: ReplicaPool, metrics: Metrics) -> None:
        self._pool = pool
        self._metrics = metrics

    async def score_all(self, jobs: Sequence[Job], top: int, deadline: float | None) -> list[PromptScores]:
        """Log probabilities of the tokens of each job's prompt, with the `top` likeliest at each place.

        `deadline`: by the loop's clock. The first error ends all. Raises TwoTowerError.
        """
        some = asyncio.Semaphore(TOGETHER)

        async def one(job: Job) -> PromptScores:
            async with some:
                return await self._counted(job, top, deadline)

        tasks = [asyncio.create_task(one(job)) for job in jobs]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _counted(self, job: Job, top: int, deadline: float | None) -> PromptScores:
        outcome = "cancelled"
        try:
            scores = await self._score(job, top, deadline)
            outcome = COMPLETED
        except Exception as error:
            outcome = outcome_of(error)
            raise
        finally:
            self._metrics.requests.labels(LABEL, outcome).inc()
        return scores

    async def _score(self, job: Job, top: int, deadline: float | None) -> PromptScores:
        tried: set[ContextReplica] = set()
        last: TwoTowerError = Unavailable("no context replica is live")
        for _ in range(MAX_FAILURES):
            replica = self._pool.pick(tried)
            if replica is None:
                break
            try:
                return await self._read(replica, job, top, deadline)
            except grpc.aio.AioRpcError as rpc:
                last = error_from_rpc(rpc)
                lost = not raised_by_peer(rpc) and rpc.code() in LOST_CODES
                if not lost and not isinstance(last, Draining | Overloaded | Unavailable):
                    raise last from None
                if lost:
                    replica.lose()
                log.info("prompt of request %s: %s; trying another context", job.request_id, last)
                tried.add(replica)
        raise last

    async def _read(self, replica: ContextReplica, job: Job, top: int, deadline: float | None) -> PromptScores:
        timeout = None
        if deadline is not None and (timeout := deadline - asyncio.get_running_loop().time()) <= 0:
            raise DeadlineExceeded("the deadline passed before the answer came")
        request = scoring_pb2.ScoreRequest(request_id=job.request_id, prompt=inference_pb2.TokenIds(ids=job.prompt), top=top)
        scores: list[TokenLogprob | None] = [None]
        replica.in_flight += 1
        call = replica.scoring.Score(request, timeout=timeout)
        try:
            async for piece in call:
                scores += logprobs_from_pb(piece.logprobs)
        finally:
            replica.in_flight -= 1
            call.cancel()
        if len(scores) != len(job.prompt):
            raise Unavailable("a context ended the log probabilities of a prompt too early")
        return scores
