"""What goes into the context's loop, and what comes out of it. Sessions are named by their ids.

Entries are taken between two iterations. Results are delivered in batches, in the event loop.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from twotower.context.copies import Copy
from twotower.engine.context_engine import Round
from twotower.engine.session import Piece
from twotower.errors import TwoTowerError
from twotower.model.delta_batch import DeltaBatch
from twotower.request import GenerationParams, Priority, TokenLogprob
from twotower.wire.frames import Key

Snapshot = Mapping[Key, Tensor]
"""A state as named tensors (see `wire.state`) that nobody writes to."""


@dataclass(frozen=True, slots=True)
class OpenSession:
    """A session waits for state memory, and then for its prompt to be read."""

    session_id: str
    tokens: Sequence[int]
    """All that are known; the last `generated` were written elsewhere."""
    generated: int
    params: GenerationParams
    priority: Priority
    rounds: Sequence[int] = ()
    """In speculative mode, how these became part of the state (see `Session.rounds`)."""


@dataclass(frozen=True, slots=True)
class ScoreTokens:
    """A prompt waits for state memory, and then to be read for the log probabilities of its tokens. Not a session."""

    session_id: str
    tokens: Sequence[int]
    top: int
    """How many of the likeliest tokens are returned at each place."""
    priority: Priority
    tell: Callable[[Sequence[TokenLogprob] | TwoTowerError], object]
    """Takes what each forward has found, in the prompt's order, or why there is no more; in the loop's thread."""


@dataclass(frozen=True, slots=True)
class CloseSession:
    """Nobody waits for the session any more: its place becomes free."""

    session_id: str


@dataclass(frozen=True, slots=True)
class CommitBlocks:
    """What one denoiser forward finished: blocks that become part of their sessions' states, and drafts that are verified."""

    blocks: Sequence[tuple[str, Piece]]
    """Each with its session."""


@dataclass(frozen=True, slots=True)
class WorkerLeft:
    """No worker holds the session any more: nobody needs a copy, and in speculative mode AR steps write on."""

    session_id: str


@dataclass(frozen=True, slots=True)
class CopyState:
    """A worker needs the state, once nothing is left to be done to it. In speculative mode the next block is a draft."""

    session_id: str
    lease: int


@dataclass(frozen=True, slots=True)
class SetPaused:
    """The client does not read (or does again) what the context tower writes alone."""

    session_id: str
    paused: bool


@dataclass(frozen=True, slots=True)
class PrefixLoaded:
    """What the tier that replicas share had for a `PrefixWanted`."""

    session_id: str
    chunks: int
    snapshot: Snapshot | None
    """None: nothing."""


@dataclass(frozen=True, slots=True)
class CopySent:
    """A copied state is on its way to its worker, or of no use any more: its memory is free."""

    copy: Copy


ContextEntry = (
    CopySent | OpenSession | ScoreTokens | CloseSession | CommitBlocks | WorkerLeft | CopyState | SetPaused | PrefixLoaded
)


@dataclass(frozen=True, slots=True)
class PrefixWanted:
    """This process has no beginning of the session's prompt; another one may have. Its reading waits for the answer."""

    session_id: str
    links: Sequence[bytes]


@dataclass(frozen=True, slots=True)
class PrefixHit:
    """A prompt began with a cached prefix: other replicas may get such prompts, too."""

    links: Sequence[bytes]
    """Of all its chunks."""
    snapshot: Snapshot


@dataclass(frozen=True, slots=True)
class StateSoonReady:
    """The forward that is about to run completes the session's state for the first time: a worker may be found meanwhile."""

    session_id: str


@dataclass(frozen=True, slots=True)
class Committed:
    """What one commit forward did: a row for each session."""

    session_ids: Sequence[str]
    lengths: Sequence[int]
    """Tokens that each state holds now."""
    deltas: DeltaBatch
    rounds: Sequence[Round | None]
    """What those came to that were drafts."""


@dataclass(frozen=True, slots=True)
class TokenDecoded:
    """The next token of a session that the context tower writes alone."""

    session_id: str
    token: int
    logprobs: Sequence[TokenLogprob]
    forwards: int
    """That it took: none where the prompt's reading gave it."""


@dataclass(frozen=True, slots=True)
class StateCopied:
    """The answer to `CopyState`."""

    session_id: str
    lease: int
    length: int
    copy: Copy
    """To be given back as `CopySent`."""


@dataclass(frozen=True, slots=True)
class SessionFailed:
    """The session cannot go on here; its place is free."""

    session_id: str
    error: TwoTowerError


ContextResult = PrefixWanted | PrefixHit | StateSoonReady | Committed | TokenDecoded | StateCopied | SessionFailed
