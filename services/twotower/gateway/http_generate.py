"""The endpoints that generate, over the core: completions and chats, whole or as streams of server-sent events."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import Message, Receive, Scope, Send

from twotower.errors import InvalidArgument, TwoTowerError, Unavailable
from twotower.events import Accepted, Block, Event, Shown
from twotower.gateway import openai_replies as replies
from twotower.gateway import sse
from twotower.gateway.bodies import Bodies
from twotower.gateway.core import Core, Prepared, ServedModel
from twotower.gateway.http_envelope import REQUEST_ID, TIMING
from twotower.gateway.json_body import parse_json
from twotower.gateway.openai_choice import ChoiceStream, Piece
from twotower.gateway.openai_fields import MAX_QUOTE, Call
from twotower.gateway.scoring import PromptScores, Scorer

log = logging.getLogger(__name__)

STEP_EVENT = "step"
"""The type of the events that show a block on its way."""

Parse = Callable[[Mapping[str, Any]], Call]
MakeReply = Callable[[Call, ServedModel, str, int], replies.Reply]


class ModelNotFoundError(HTTPException):
    """A name that is not served here."""


def check_model(core: Core, name: str | None) -> None:
    """Raise ModelNotFoundError unless that model is served; None: whichever is."""
    if name is not None and name != core.model.name:
        raise ModelNotFoundError(404, f"the model {name[:MAX_QUOTE]!r} does not exist; this server has {core.model.name!r}")


class Generate:
    """An endpoint as a plain ASGI application, so that a client's leaving is noticed at any moment."""

    def __init__(
        self, core: Core, bodies: Bodies, scorer: Scorer, parse: Parse, make_reply: MakeReply, prompt_field: str = "prompt"
    ) -> None:
        """`prompt_field`: what the endpoint's clients call the prompt."""
        self._core = core
        self._bodies = bodies
        self._scorer = scorer
        self._parse_body = parse
        self._make_reply = make_reply
        self._prompt_field = prompt_field

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        arrived = asyncio.get_running_loop().time()
        try:
            async with self._bodies.read(Request(scope, receive)) as body:
                call = await self._parse(body)
                body.clear()
                await self._serve(call, arrived, receive, send)
        except ClientDisconnect:
            return

    async def _parse(self, body: bytearray) -> Call:
        try:
            call = await self._core.read(len(body), lambda: self._parse_body(parse_json(body)))
            check_model(self._core, call.model)
        except (TwoTowerError, ModelNotFoundError):
            self._core.metrics.requests.labels("unknown", "invalid").inc()
            raise
        return call

    async def _serve(self, call: Call, arrived: float, receive: Receive, send: Send) -> None:
        started = False

        async def noting(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await _while_connected(receive, self._answer(call, arrived, noting))
        except asyncio.CancelledError:
            if not self._core.draining:
                raise
            error = Unavailable("this gateway is shutting down")  # and the drain's time is over
            if not started:
                raise error from None
            if call.stream:
                await sse.event(send, replies.error_body(error))
                await sse.end(send)

    async def _answer(self, call: Call, arrived: float, send: Send) -> None:
        deadline = None if call.timeout_s is None else arrived + call.timeout_s
        with self._core.admit(call.requests):
            try:
                prepared = await self._core.prepare(call.requests)
            except InvalidArgument as error:
                if error.field != "prompt" or self._prompt_field == "prompt":
                    raise
                raise InvalidArgument(self._prompt_field, str(error).removeprefix("prompt: ")) from None
            answer = _Answer(self._core, self._scorer, call, prepared, arrived, deadline, self._make_reply)
            await (answer.stream(send) if call.stream else answer.whole(send))


@dataclass(frozen=True, slots=True)
class _Step:
    """A choice's block on its way."""

    index: int
    shown: Shown


class _Answer:
    """One call on its way."""

    def __init__(
        self,
        core: Core,
        scorer: Scorer,
        call: Call,
        prepared: Sequence[Prepared],
        arrived: float,
        deadline: float | None,
        make_reply: MakeReply,
    ) -> None:
        self._core = core
        self._scorer = scorer
        self._call = call
        self._prepared = prepared
        self._arrived = arrived
        self._deadline = deadline
        self._request_id = prepared[0].job.request_id
        self._reply = make_reply(call, core.model, self._request_id, int(time.time()))
        self._warnings = list(dict.fromkeys(warning for request in prepared for warning in request.warnings))
        self._totals = replies.Totals()
        self._choices = [ChoiceStream(core.model, request, index) for index, request in enumerate(prepared)]
        self._timing: list[str] = []

    async def whole(self, send: Send) -> None:
        """All of it at once."""
        choices: list[list[Piece]] = [[] for _ in self._prepared]
        async with aclosing(self._pieces()) as pieces:
            async for piece in pieces:
                assert isinstance(piece, Piece)  # steps are for streams only
                choices[piece.index].append(piece)
        body = self._reply.whole(choices, self._totals.body(), self._warnings)
        await JSONResponse(body, headers=self._headers())({"type": "http"}, _nothing, send)

    async def stream(self, send: Send) -> None:
        """Server-sent events. The status waits for the first block, so that what fails before is a plain error."""
        call, started, opened = self._call, False, set[int]()
        try:
            async with aclosing(self._pieces()) as pieces:
                async for piece in pieces:
                    if not started:
                        await sse.begin(send, self._headers())
                    first = {"warnings": self._warnings} if self._warnings and not started else {}
                    started = True
                    if isinstance(piece, _Step):
                        await sse.event(send, {**self._reply.step(piece.index, piece.shown), **first}, STEP_EVENT)
                        continue
                    if piece.index not in opened:
                        opened.add(piece.index)
                        if (opening := self._reply.opening(piece.index)) is not None:
                            await sse.event(send, {**opening, **self._usage_so_far()})
                    await sse.event(send, {**self._reply.chunk(piece), **self._usage_so_far(), **first})
        except Exception as error:
            if not started:
                raise
            if not isinstance(error, TwoTowerError):
                log.exception("a stream failed")
            await sse.event(send, replies.error_body(error))
        else:
            if call.include_usage:
                await sse.event(send, self._reply.usage_chunk(self._totals.body()))
            await sse.done(send)
        await sse.end(send)

    def _usage_so_far(self) -> dict[str, Any]:
        """A stream that will end with the usage has the key in each piece."""
        if self._call.continuous_usage:
            return {"usage": self._totals.body()}
        return {"usage": None} if self._call.include_usage else {}

    def _headers(self) -> dict[str, str]:
        self._note("total")
        return {REQUEST_ID.decode(): self._request_id, TIMING.decode(): ", ".join(self._timing)}

    def _note(self, what: str) -> None:
        """For `Server-Timing`: what has been reached by now."""
        since = asyncio.get_running_loop().time() - self._arrived
        self._timing.append(f"{what};dur={1000 * since:.1f}")

    async def _pieces(self) -> AsyncGenerator[Piece | _Step, None]:
        """Pieces of all choices as they come, and looks at blocks on their way; the first error ends all."""
        self._note("read")
        call, prepared = self._call, self._prepared
        if call.echo:
            async for piece in self._echo():
                yield piece
        if not call.generates:
            return
        first = True
        async with aclosing(_merged([self._core.run(request, self._deadline) for request in prepared])) as events:
            async for index, event in events:
                if isinstance(event, Accepted):
                    if index % call.n == 0:  # a prompt counts once, whatever its choices
                        self._totals.accept(event.prompt_tokens)
                    continue
                if first:
                    self._note("first-block")
                    first = False
                if isinstance(event, Shown):
                    yield _Step(index, event)
                    continue
                piece = self._choices[index].push(event)
                if isinstance(event, Block):
                    self._totals.block(event)
                self._totals.tell(piece)
                yield piece

    async def _echo(self) -> AsyncGenerator[Piece, None]:
        """Each choice's prompt."""
        call, model = self._call, self._core.model
        jobs = [request.job for request in self._prepared[:: call.n]]
        scores: Sequence[PromptScores] = [()] * len(jobs)
        if call.logprobs is not None:
            scores = await self._scorer.score_all(jobs, call.logprobs, self._deadline)
            self._note("score")
        for index, choice in enumerate(self._choices):
            number = index // call.n
            prompt, asked = jobs[number].prompt, call.requests[index].prompt
            if index % call.n == 0 and not call.generates:
                self._totals.accept(len(prompt))
            text = asked if isinstance(asked, str) else model.tokenizer.decode(prompt) if model.tokenizer else ""
            piece = choice.echo(text, prompt, scores[number], model)
            yield piece if call.generates else _ended(piece)


def _ended(piece: Piece) -> Piece:
    """A prompt that nothing follows: no token was asked for."""
    return Piece(piece.index, piece.text, piece.tokens, "length")


async def _nothing() -> Message:
    return {"type": "http.disconnect"}


async def _merged(streams: Sequence[AsyncGenerator[Event, None]]) -> AsyncGenerator[tuple[int, Event], None]:
    """Events of several generations as they come, each with its stream's index; the first error ends all."""
    queue: asyncio.Queue[tuple[int, Event | Exception | None]] = asyncio.Queue(maxsize=len(streams))

    async def pump(index: int, stream: AsyncGenerator[Event, None]) -> None:
        try:
            async with aclosing(stream):
                async for event in stream:
                    await queue.put((index, event))
        except Exception as error:
            await queue.put((index, error))
        else:
            await queue.put((index, None))

    tasks = [asyncio.create_task(pump(index, stream)) for index, stream in enumerate(streams)]
    try:
        running = len(tasks)
        while running:
            index, item = await queue.get()
            if item is None:
                running -= 1
            elif isinstance(item, Exception):
                raise item
            else:
                yield index, item
    finally:
        await _cancel(*tasks)


async def _while_connected(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Run `work`, and cancel it as soon as the client is gone. The body must have been read."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    task, watcher = asyncio.create_task(work), asyncio.create_task(gone())
    try:
        await asyncio.wait((task, watcher), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            await task  # for its error
    finally:
        await _cancel(task, watcher)


async def _cancel(*tasks: asyncio.Task[None]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
