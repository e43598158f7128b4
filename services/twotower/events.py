"""What a generation tells while it runs: one Accepted, a Block per finished block, one Finished.

The nouns of the public API's stream, shared by the gateway and the client.
"""

from __future__ import annotations

from dataclasses import dataclass

from twotower.request import NO_DRAFT, BlockStep, DraftUse, FinishReason, TokenLogprob


@dataclass(frozen=True, slots=True)
class Accepted:
    """The request was checked and taken."""

    request_id: str
    prompt_tokens: int
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Block:
    """A finished block; in AR mode one token, in speculative mode what a round, or an AR step, wrote."""

    index: int
    """Counted from 0."""
    token_ids: tuple[int, ...]
    """Cut at max_tokens and after the end-of-sequence token."""
    text: str
    """What these tokens add; bytes of an unfinished character, and what may begin a stop string, come later."""
    forwards: int
    logprobs: tuple[TokenLogprob, ...] = ()
    """One for each token, if the request asked for them."""
    use: DraftUse = NO_DRAFT
    """In speculative mode, what it took; `forwards` are the denoiser's then."""


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
    rounds: int = 0
    """In speculative mode,"""
    use: DraftUse = NO_DRAFT
    """and what they took, and the AR steps between them."""


Event = Accepted | Block | Shown | Finished
