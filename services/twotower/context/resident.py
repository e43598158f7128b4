"""A session that holds state memory of the context, as its loop plans it."""

from __future__ import annotations

from collections.abc import Sequence

from twotower.context.messages import OpenSession
from twotower.context.prefixes import PromptBorders
from twotower.engine.session import Session, room_for
from twotower.request import Mode


class ContextResident:
    """A session, and what keeps the loop from going on with it. Implements `engine.scheduler.Schedulable`."""

    def __init__(self, session: Session, borders: PromptBorders) -> None:
        self.session = session
        self.borders = borders
        """Where its prompt can be cached."""
        self.awaits_prefix = False
        """Another replica is being asked for the beginning of its prompt."""
        self.paused = False
        """Its client does not read."""
        self.alone = False
        """See `Schedulable`."""
        self.held = False
        """A worker writes its next block, or drafts it: no AR step may write these tokens."""
        self.announced = False
        """`StateSoonReady` has been delivered."""
        self.copy_for: int | None = None
        """The lease of a worker that waits for a copy of the state."""

    @staticmethod
    def room_of(entry: OpenSession) -> int:
        """Tokens that its state must have room for."""
        return room_for(len(entry.tokens), entry.generated, entry.params)

    @property
    def name(self) -> str:
        """The session's id."""
        return self.session.id

    @property
    def over(self) -> bool:
        """In the autoregressive modes, the last token is written. Otherwise a session is closed when it is over."""
        return self.session.finish_reason is not None

    @property
    def position(self) -> int:
        """See `Schedulable`."""
        return self.session.state.length

    @property
    def prefill_left(self) -> int:
        """See `Schedulable`."""
        return 0 if self.awaits_prefix else self.session.prefill_left

    @property
    def block(self) -> Sequence[int] | None:
        """See `Schedulable`."""
        return self.session.blocks[0].tokens if self.session.blocks and not self.session.prefill_left else None

    @property
    def decodes(self) -> bool:
        """See `Schedulable`."""
        by_steps = self.session.params.mode.autoregressive and not self.held
        return by_steps and not self.session.prefill_left and not self.paused

    @property
    def settled(self) -> bool:
        """The state holds all that a worker needs: what is written, or in speculative mode all but the last token."""
        if self.session.prefill_left or self.session.blocks or self.over:
            return False
        return self.session.params.mode is Mode.DIFFUSION or self.session.pending is not None
