"""A session as the context's services see it: a gateway that listens, and at most one worker that writes."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from twotower.broker.ready_queue import EntryId
from twotower.engine.effort import Effort, Times
from twotower.engine.session import Transcript, room_for
from twotower.errors import TwoTowerError
from twotower.request import NO_DRAFT, BlockStep, DraftUse, FinishReason, GenerationParams, Mode, Priority, TokenLogprob

if TYPE_CHECKING:
    from twotower.context.link import WorkerLink

MAX_UNREAD = 32
"""Blocks, or AR tokens, that wait for a client who does not read them; then its session pauses."""
RESUME_UNREAD = 16
"""A session that paused goes on when no more than these are unread."""


@dataclass(frozen=True, slots=True)
class ShownBlock:
    """A block, an AR token, or what a round wrote, as the gateway shows it."""

    tokens: Sequence[int]
    forwards: int
    logprobs: Sequence[TokenLogprob]
    """One for each token, if asked for."""
    use: DraftUse = NO_DRAFT


LiveEvent = ShownBlock | BlockStep | FinishReason | TwoTowerError
"""A block, a look at the next one, the end, or why the session failed."""


class LiveSession:
    """What is known of a session outside of the loop that has its state. Used in the event loop only."""

    def __init__(
        self,
        session_id: str,
        tokens: int,
        params: GenerationParams,
        priority: Priority = Priority.NORMAL,
        *,
        generated: int = 0,
        failures: int = 0,
        last_token: int | None = None,
        times: Times | None = None,
    ) -> None:
        """tokens: how many are known, of which the last `generated` were written elsewhere; last_token: the last of these.

        times: of what a draft takes and earns.
        """
        self.id = session_id
        self.params = params
        self.priority = priority
        self.room = room_for(tokens, generated, params)
        """Tokens that its state must have room for."""
        self.transcript = Transcript(params, generated)
        self.last_token = last_token
        """The last one that is written: a draft begins with it."""
        self.effort = Effort(params.block_size, params.steps, times) if params.mode is Mode.SPECULATIVE else None
        """In speculative mode, what its drafts may cost."""
        self.draft_forwards = 0
        """Of the denoiser, for the draft that is being verified."""
        self.failures = failures
        """Failures of the request since the last block in which a worker had a part, on whatever replica or worker."""
        self.lease = 0
        """Counts how often it was queued, and how often a worker lost it. What comes with another one is dropped."""
        self.entry_id: EntryId | None = None
        """Its entry in the ready queue, while it waits there."""
        self.tokens = tokens
        """Known when it was opened."""
        self.opened = 0.0
        """When that was, by the event loop's clock."""
        self.read = False
        """Its prompt is read, or will be with the forward under way."""
        self.handed_in = 0.0
        """When its last block came, by the event loop's clock."""
        self.waiting_since = 0.0
        """When it was last queued, by the event loop's clock."""
        self.link: WorkerLink | None = None
        """The worker that holds it."""
        self.has_state = False
        """A copy of the state has been sent to it; deltas may follow."""
        self.missing: EntryId | None = None
        """The entry, if it was not in the queue when it was last looked for."""
        self.writing = False
        """That worker writes its next block."""
        self.paused = False
        """Its client does not read."""
        self.over = False
        """Nothing more is to be generated, or nobody would read it."""
        self._events: asyncio.Queue[LiveEvent] = asyncio.Queue()

    @property
    def resting(self) -> bool:
        """Whether the context writes it alone: always in AR mode; in speculative mode where drafts earn less, for a while."""
        return self.params.mode is Mode.AR or (self.effort is not None and self.effort.resting)

    @property
    def wants_worker(self) -> bool:
        """Whether a worker is to write its next block, or to draft it."""
        return not (self.resting or self.over or self.paused)

    def emit(
        self, tokens: Sequence[int], forwards: int, logprobs: Sequence[TokenLogprob] = (), use: DraftUse = NO_DRAFT
    ) -> None:
        """Take a finished block; when it was the last, the session is `over`."""
        shown = self.transcript.emit(tokens)
        self.last_token = shown[-1]
        self._events.put_nowait(ShownBlock(shown, forwards, logprobs[: len(shown)], use.shown(len(shown))))
        self.paused = self.paused or self._events.qsize() >= MAX_UNREAD
        if self.transcript.finish_reason is not None:
            self._events.put_nowait(self.transcript.finish_reason)
            self.over = True

    def show(self, step: BlockStep) -> None:
        """Take a look at the next block. It is dropped where the client would not read it soon.

        Of a draft, the first token is text already, and all others may be refused: none is shown as committed.
        """
        if self.over or self._events.qsize() >= RESUME_UNREAD:
            return
        if self.effort is not None:
            behind = step.token_ids[1:]
            step = BlockStep(step.number, behind, (False,) * len(behind), step.confidence[1:])
        self._events.put_nowait(step)

    def fail(self, error: TwoTowerError) -> None:
        """End the session with an error, unless it is over."""
        if not self.over:
            self._events.put_nowait(error)
            self.over = True

    async def next_event(self) -> LiveEvent:
        """For the gateway, in order."""
        return await self._events.get()

    def resume(self) -> bool:
        """Whether the session was paused, and goes on now that its client reads."""
        if self.paused and self._events.qsize() <= RESUME_UNREAD:
            self.paused = False
            return not self.over
        return False
