"""The gateway's one core: both faces give it requests and take events from it."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from typing import TypeVar

from twotower.errors import InvalidArgument, Overloaded, Unavailable
from twotower.events import Accepted, Block, Event, Finished, Shown
from twotower.gateway.metrics import CANCELLED, COMPLETED, Metrics, outcome_of
from twotower.gateway.preparation import Preparation, hidden_ids, text_stream
from twotower.gateway.replicas import ReplicaPool
from twotower.gateway.request import Request
from twotower.gateway.sessions import Job, SessionStream
from twotower.request import NO_DRAFT, BlockStep, FinishReason, Mode, ModelLimits
from twotower.text.chat_template import ChatTemplate
from twotower.text.tokenizer import Tokenizer
from twotower.wire.logprobs import logprobs_from_pb
from twotower.wire.params import draft_use_from_pb

T = TypeVar("T")

LONG = 1024
"""Characters or ids of a request above which it is read in a thread, so that streams of others do not wait for it."""
READERS = 2
"""Requests that are read in threads at once; what reading takes of the memory is theirs alone."""


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What is served."""

    name: str
    identity: str
    limits: ModelLimits
    tokenizer: Tokenizer | None
    created: int
    """When the gateway began to serve it, in seconds since 1970."""
    chat: ChatTemplate | None = None
    """How messages become a prompt; None: the checkpoint takes no chats."""

    @property
    def hidden_ids(self) -> tuple[int, ...]:
        """Ids that never show in text, besides the tokenizer's special tokens."""
        return hidden_ids(self.limits)


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request that can be served."""

    job: Job
    stop: tuple[str, ...]
    warnings: tuple[str, ...]


class Core:
    """Checks, admits, routes and streams: `admit`, then `prepare`, then `run`."""

    def __init__(
        self, model: ServedModel, pool: ReplicaPool, metrics: Metrics, *, max_in_flight: int, reopen_wait_s: float
    ) -> None:
        self.model = model
        self.metrics = metrics
        self._pool = pool
        self.max_in_flight = max_in_flight
        """Requests that are taken at once."""
        self._reopen_wait_s = reopen_wait_s
        self._in_flight = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._draining = False
        self._readers = ThreadPoolExecutor(READERS, "reader")

    def close(self) -> None:
        """End the threads."""
        self._readers.shutdown(wait=False, cancel_futures=True)

    async def read(self, size: int, work: Callable[[], T]) -> T:
        """The result of `work`, which reads what a client sent: in a thread if its `size` is large."""
        if size <= LONG:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._readers, work)

    def why_not_ready(self) -> str | None:
        """Why requests would fail now; None if they will succeed."""
        if self._draining:
            return "this gateway is shutting down"
        if self._pool.contexts == 0:
            return "no context replica is live"
        if self._pool.denoisers == 0:
            return "no denoiser is live"
        return None

    async def prepare(self, requests: Sequence[Request]) -> list[Prepared]:
        """Check and tokenize admitted requests. Raises InvalidArgument, which names the field."""
        prompts = dict.fromkeys(request.prompt for request in requests)  # a prompt may have several choices
        return await self.read(sum(map(len, prompts)), lambda: self._prepare(requests))

    def _prepare(self, requests: Sequence[Request]) -> list[Prepared]:
        preparation = Preparation(self.model.tokenizer, self.model.limits)
        prepared = []
        for request in requests:
            try:
                checked = preparation.check(request)
            except InvalidArgument as error:
                self._count(request.mode, outcome_of(error))
                raise
            job = Job(uuid.uuid4().hex, checked.prompt, checked.params, request.priority)
            prepared.append(Prepared(job, request.stop, checked.warnings))
        return prepared

    @contextmanager
    def admit(self, requests: Sequence[Request]) -> Iterator[None]:
        """Take these requests, all or none, for as long as the context lasts. Raises Overloaded, Unavailable.

        What is refused here has cost nothing; what they contain is for `prepare` to say.
        """
        try:
            self._check_admission(requests)
        except (InvalidArgument, Overloaded, Unavailable) as error:
            for request in requests:
                self._count(request.mode, outcome_of(error))
            raise
        self._change_in_flight(len(requests))
        try:
            yield
        finally:
            self._change_in_flight(-len(requests))

    async def run(self, request: Prepared, deadline: float | None = None) -> AsyncGenerator[Event, None]:
        """Generate an admitted request. Closing this generator cancels the work at once.

        `deadline`: by the loop's clock.
        """
        params, metrics, mode = request.job.params, self.metrics, request.job.params.mode.value
        text = text_stream(self.model.tokenizer, self.model.limits, request.stop)
        tokens = forwards = blocks = rounds = 0
        use = NO_DRAFT
        reason: FinishReason | None = None
        outcome = CANCELLED
        start = last = time.monotonic()
        metrics.prompt_tokens.inc(len(request.job.prompt))
        session = SessionStream(
            self._pool,
            request.job,
            wait_s=self._reopen_wait_s,
            deadline=deadline,
            on_open=metrics.count_route,
            on_reopen=metrics.reopened.inc,
        )
        try:
            yield Accepted(request.job.request_id, len(request.job.prompt), request.warnings)
            async with aclosing(session.events()) as events:
                async for event in events:
                    if isinstance(event, FinishReason):
                        reason = event
                        break
                    if isinstance(event, BlockStep):
                        yield Shown(blocks, _cut(event, params.max_tokens - tokens))
                        continue
                    last = time.monotonic()
                    if blocks == 0:
                        metrics.first_block_s.labels(mode).observe(last - start)
                    tokens += len(event.token_ids)
                    forwards += event.forwards
                    metrics.completion_tokens.labels(mode).inc(len(event.token_ids))
                    metrics.forwards.labels(mode).inc(event.forwards)
                    spent = draft_use_from_pb(event.draft)
                    metrics.count_round(spent, len(event.token_ids))
                    use, rounds = use + spent, rounds + (spent.drafted > 0)
                    piece = text.push(event.token_ids) if text else ""
                    if text and text.stopped:
                        await events.aclose()  # before the client is waited for: the work ends now
                    logprobs = logprobs_from_pb(event.logprobs)
                    yield Block(blocks, tuple(event.token_ids), piece, event.forwards, logprobs, spent)
                    blocks += 1
                    if text and text.stopped:
                        reason = FinishReason.STOP
                        break
            rest = text.finish() if text else ""
            if reason is None or (text and text.stopped):
                reason = FinishReason.STOP
            outcome = COMPLETED
            metrics.duration_s.labels(mode).observe(last - start)
            yield Finished(reason, tokens, forwards, blocks, last - start, rest, rounds, use)
        except Exception as error:
            outcome = outcome_of(error)
            raise
        finally:
            self._count(params.mode, outcome)

    @property
    def draining(self) -> bool:
        """Whether new requests are refused, since this gateway is about to end."""
        return self._draining

    def refuse(self) -> None:
        """Take no new requests from now on."""
        self._draining = True

    async def drain(self, limit_s: float) -> None:
        """Refuse new requests, and wait up to `limit_s` for those in flight."""
        self.refuse()
        try:
            async with asyncio.timeout(limit_s):
                await self._idle.wait()
        except TimeoutError:
            pass

    def _check_admission(self, requests: Sequence[Request]) -> None:
        if self._draining:
            raise Unavailable("this gateway is shutting down")
        if len(requests) > self.max_in_flight:
            raise InvalidArgument("prompt", f"{len(requests)} prompts at once; this gateway takes {self.max_in_flight}")
        if self._in_flight + len(requests) > self.max_in_flight:
            raise Overloaded(f"{self._in_flight} requests are in flight, and {self.max_in_flight} is the most; try again")
        if self._pool.contexts == 0:
            raise Unavailable("no context replica is live")
        if self._pool.denoisers == 0 and any(request.mode is Mode.DIFFUSION for request in requests):
            raise Unavailable('no denoiser is live, which mode "diffusion" needs; mode "ar" works without one')

    def _change_in_flight(self, change: int) -> None:
        self._in_flight += change
        self.metrics.in_flight.set(self._in_flight)
        if self._in_flight:
            self._idle.clear()
        else:
            self._idle.set()

    def _count(self, mode: Mode, outcome: str) -> None:
        self.metrics.requests.labels(mode.value, outcome).inc()


def _cut(step: BlockStep, remaining: int) -> BlockStep:
    """What of a block can become text, of which `remaining` tokens may still come."""
    if len(step.token_ids) <= remaining:
        return step
    return BlockStep(step.number, step.token_ids[:remaining], step.committed[:remaining], step.confidence[:remaining])
