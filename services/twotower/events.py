"""What a generation tells while it runs: one Accepted, a Block per finished block, one Finished.

The nouns of the public API's stream, shared by the gateway and the client.
"""

from __future__ import annotations

from dataclasses import dataclass

from twotower.request import BlockStep, FinishReason, TokenLogprob


@dataclass(frozen=True, slots=True)
class Accepted:
    """The request was checked and taken."""

    request_id: str
    prompt_tokens: int
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Block:
    """A finished block; in AR mode one token."""

    index: int
    """Counted from 0."""
    token_ids: tuple[int, ...]
    """Cut at max_tokens and after the end-of-sequence token."""
    text: str
    """What these tokens add; bytes of an unfinished character, and what may begin a stop string, come later."""
    forwards: int
    logprobs: tuple[TokenLogprob, ...] = ()
    """One for each token, if the request asked for them."""


@dataclass(frozen=True, slots=True)
class Shown:
    """A block on its way, if the request asked for such events; some may be missing, or come again."""

    block: int
    """Counted from 0."""
    step: BlockStep
    """Cut at max_tokens."""


@dataclass(frozen=True, slots=True)
class Finished:
    """The totals."""

    finish_reason: FinishReason
    completion_tokens: int
    forwards: int
    blocks: int
    seconds: float
    """From acceptance to the last block."""
    text: str = ""
    """Text held back until the end was known."""


Event = Accepted | Block | Shown | Finished
