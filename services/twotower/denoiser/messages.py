"""What goes into the denoiser's loop, and what comes out of it. Entries are taken between two forwards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from twotower.engine.refinement import Refinement
from twotower.request import BlockStep, GenerationParams
from twotower.transport.interface import Received


class Held(NamedTuple):
    """A session, as this worker holds it."""

    session_id: str
    lease: int


class Draft(NamedTuple):
    """What is known of a draft."""

    token: int
    """Its first one."""
    steps: int
    """Forwards that it may take."""


@dataclass(frozen=True, slots=True)
class Begin:
    """A session's state has come: its first block is to be refined."""

    held: Held
    context: str
    """The address of its context. What one forward finishes is handed in by context."""
    params: GenerationParams
    room: int
    """Tokens that its state must have room for."""
    length: int
    generated: int
    state: Received
    draft: Draft | None = None
    """The block is a draft."""


class Row(NamedTuple):
    """A session's row of a commit."""

    held: Held
    length: int
    """Tokens that the state holds with it."""
    generated: int
    kept: int
    """Tokens of the block that were taken into the state."""
    draft: Draft | None = None
    """The next block is a draft."""


@dataclass(frozen=True, slots=True)
class Extend:
    """What one commit made of blocks of this worker: the sessions' next blocks are to be refined."""

    rows: Sequence[Row]
    block_size: int
    """Positions of a row in the tensors."""
    deltas: Received


@dataclass(frozen=True, slots=True)
class Leave:
    """Sessions that are not this worker's any more."""

    held: Sequence[Held]


DenoiserEntry = Begin | Extend | Leave


@dataclass(frozen=True, slots=True)
class BlocksFinished:
    """What one forward finished of one context's sessions."""

    context: str
    blocks: Sequence[tuple[Held, Refinement]]


@dataclass(frozen=True, slots=True)
class BlocksShown:
    """Blocks of one context's sessions as one forward left them, for clients that watch."""

    context: str
    blocks: Sequence[tuple[Held, int, BlockStep]]
    """Each with the tokens generated before it."""


@dataclass(frozen=True, slots=True)
class SessionsFailed:
    """Sessions that cannot go on here; their slots are free."""

    sessions: Sequence[tuple[Held, Exception]]


@dataclass(frozen=True, slots=True)
class SlotsFree:
    """Sessions that have left; their slots are free."""

    held: Sequence[Held]


@dataclass(frozen=True, slots=True)
class TensorsRead:
    """A transfer that nobody reads any more."""

    received: Received


DenoiserResult = BlocksFinished | BlocksShown | SessionsFailed | SlotsFree | TensorsRead
