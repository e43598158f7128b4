"""The gateway's one core: both faces give it requests and take events from it."""

from __future__ import annotations

import asyncio
import dataclasses
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from typing import TypeVar

from twotower.broker.registry import ReplicaKind
from twotower.errors import InvalidArgument, Overloaded, Unavailable
from twotower.events import Accepted, Block, Event, Finished, Shown
from twotower.gateway.holding import Holding
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


IN_AR = 'no denoiser is live: mode "ar" is used instead of "diffusion"'
"""Warning of a reply."""


class Core:
    """Checks, admits, routes and streams: `admit`, then `prepare`, then `run`."""

    def __init__(
        self,
        model: ServedModel,
        pool: ReplicaPool,
        metrics: Metrics,
        *,
        max_in_flight: int,
        reopen_wait_s: float,
        ar_fallback: bool = False,
        from_zero: Collection[ReplicaKind] = (),
    ) -> None:
        """reopen_wait_s: how long a request waits for a replica while none is live. from_zero: of these, none need be live."""
        self.model = model
        self.metrics = metrics
        self._pool = pool
        self.max_in_flight = max_in_flight
        """Requests that are taken at once."""
        self._reopen_wait_s = reopen_wait_s
        self._ar_fallback = ar_fallback
        self._from_zero = from_zero
        self.held_for_context = Holding(lambda: pool.contexts, reopen_wait_s, "no context replica is live, nor became so")
        self.held_for_denoiser = Holding(
            lambda: pool.denoisers,
            reopen_wait_s,
            'no denoiser is live, which mode "diffusion" needs (mode "ar" works without one), nor became so',
        )
        self._in_flight = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._draining = False
        self.leaving = False
        """Requests are still taken, but should go to others."""
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
        if self.leaving:
            return "this gateway is draining" if self._in_flight else "this gateway is drained"
        if self._missing("context"):
            return "no context replica is live"
        if not self._ar_fallback and self._missing("denoiser"):
            return "no denoiser is live"
        return None

    def _missing(self, kind: ReplicaKind) -> bool:
        """Whether none has been live for longer than requests wait for one. Until then they are held, and the gateway is
        ready: otherwise nobody could be served while a replica that is alone restarts."""
        return kind not in self._from_zero and self._pool.none_for_s(kind) > self._reopen_wait_s

    async def prepare(self, requests: Sequence[Request]) -> list[Prepared]:
        """Check and tokenize admitted requests. Raises InvalidArgument, which names the field."""
        prompts = dict.fromkeys(request.prompt for request in requests)  # a prompt may have several choices
        prepared = await self.read(sum(map(len, prompts)), lambda: self._prepare(requests))
        return [self._in_ar_if_need_be(request) for request in prepared]

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
            await self._hold(params.mode, deadline)
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

    async def _hold(self, mode: Mode, deadline: float | None) -> None:
        """Wait until there are replicas for a request. Raises Unavailable, DeadlineExceeded."""
        await self.held_for_context.wait(deadline)
        if mode is Mode.DIFFUSION:
            await self.held_for_denoiser.wait(deadline)

    def _in_ar_if_need_be(self, request: Prepared) -> Prepared:
        """The request, in AR mode if there is no denoiser and the operator allows it."""
        params = request.job.params
        if not self._ar_fallback or params.mode is not Mode.DIFFUSION or self._pool.denoisers:
            return request
        job = dataclasses.replace(request.job, params=dataclasses.replace(params, mode=Mode.AR))
        return dataclasses.replace(request, job=job, warnings=(*request.warnings, IN_AR))

    @property
    def in_flight(self) -> int:
        """Requests that are being served, or held."""
        return self._in_flight

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
