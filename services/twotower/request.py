"""The nouns of a generation that every part shares, and the one place where a request is checked.

No torch, no gRPC, no Redis here.
"""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass

from twotower.errors import InvalidArgument

MAX_BLOCK_SIZE = 256
"""Largest block that the engine takes; quality breaks long before, above the trained size."""

MAX_SEED = 2**63 - 1

MAX_TOP_K = 2**31 - 1

MAX_EOS_TOKENS = 64
"""Every generated token is compared with each."""

MAX_TIMEOUT_S = 1_000_000_000
"""gRPC counts a deadline in nanoseconds, in 64 bits: one much further away would have passed."""

MAX_LOGPROBS = 5
"""Likeliest tokens that are told at each place; as many as OpenAI tells."""


class Mode(enum.Enum):
    """How text is generated. Mock-AR checks the two towers against each other, in one process only."""

    DIFFUSION = "diffusion"
    AR = "ar"
    SPECULATIVE = "speculative"
    """The denoiser drafts, the context tower verifies: AR's text, to the token."""
    MOCK_AR = "mock-ar"

    @property
    def autoregressive(self) -> bool:
        """Whether every token is the context tower's own choice."""
        return self in (Mode.AR, Mode.SPECULATIVE)


class FinishReason(enum.Enum):
    """Why a generation ended."""

    STOP = "stop"
    LENGTH = "length"


class Priority(enum.IntEnum):
    """Who goes first where requests wait: for state memory, and for a worker. Nothing that runs is interrupted."""

    LOW = -1
    NORMAL = 0
    HIGH = 1


@dataclass(frozen=True, slots=True)
class ModelLimits:
    """What of a checkpoint decides whether a request can be served."""

    vocab_size: int
    max_context: int
    block_size: int
    """The block size the checkpoint was trained with; the default of a request."""
    mask_token_id: int
    eos_token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class GenerationParams:
    """How to generate, resolved: every field has its value. Checked by `check_request`."""

    mode: Mode = Mode.DIFFUSION
    max_tokens: int = 256
    block_size: int = 16
    steps: int = 16
    """Forwards of the denoiser for a block, at most. In speculative mode 0: chosen for each draft by what drafts earn."""
    gamma: float = 0.8
    temperature: float = 0.0
    top_k: int = 0
    """Draw among so many of the likeliest tokens only; 0: among all. Nothing at temperature 0."""
    top_p: float = 1.0
    """Draw among the likeliest tokens that together have this probability. Nothing at temperature 0."""
    seed: int = 0
    eos_token_ids: tuple[int, ...] = ()
    """Generation ends after the first of these; empty: at `max_tokens` only."""
    logprobs: int | None = None
    """Tell each token's log probability, and so many of the likeliest at its place; None: neither."""
    show_steps: bool = False
    """Show each block as it is after every forward."""


@dataclass(frozen=True, slots=True)
class DraftUse:
    """What a round of speculative mode took, or an AR step in that mode; of other modes nothing is counted."""

    drafted: int = 0
    """Tokens that the denoiser proposed."""
    accepted: int = 0
    """Of these, how many became text."""
    context_forwards: int = 0
    """Forwards of the context tower."""

    def __add__(self, other: DraftUse) -> DraftUse:
        return DraftUse(
            self.drafted + other.drafted, self.accepted + other.accepted, self.context_forwards + other.context_forwards
        )

    def shown(self, tokens: int) -> DraftUse:
        """The same, where only so many of the tokens that it earned are shown."""
        return dataclasses.replace(self, accepted=min(self.accepted, tokens))


NO_DRAFT = DraftUse()


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """What the model gave a token, in the forward that committed it."""

    logprob: float
    """Natural logarithm of its probability at temperature 1; of a block's token, with the mask id excluded."""
    top: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens at its place and their logprobs, the likeliest first; of equal ones, the lower id."""
    step: int = 1
    """The forward of its block that committed it, counted from 1."""


@dataclass(frozen=True, slots=True)
class BlockStep:
    """A block after one of its forwards: provisional where it is not committed."""

    number: int
    """Which of the block's forwards, counted from 1."""
    token_ids: tuple[int, ...]
    """Where a position is not committed, the likeliest token there."""
    committed: tuple[bool, ...]
    confidence: tuple[float, ...]
    """Of each token, its probability; of a committed one, in the forward that committed it."""


def check_request(prompt: Sequence[int], params: GenerationParams, limits: ModelLimits) -> list[str]:
    """Refuse a request that cannot be served, before any work.

    Returns warnings for one that can, but not as its sender may expect.
    Raises InvalidArgument, which names the field.
    """
    if not prompt:
        raise InvalidArgument("prompt", "is empty; at least one token is needed")
    for i, token in enumerate(prompt):
        if not 0 <= token < limits.vocab_size:
            raise InvalidArgument("prompt", f"token {token} at position {i} is outside the vocabulary [0, {limits.vocab_size})")
    if params.max_tokens < 1:
        raise InvalidArgument("max_tokens", f"must be at least 1, not {params.max_tokens}")
    if len(prompt) >= limits.max_context:
        raise InvalidArgument("prompt", f"{len(prompt)} tokens leave no room in the context of {limits.max_context}")
    if len(prompt) + params.max_tokens > limits.max_context:
        raise InvalidArgument(
            "max_tokens",
            f"{len(prompt)} prompt tokens and {params.max_tokens} to generate exceed the context of {limits.max_context}",
        )
    if not 1 <= params.block_size <= MAX_BLOCK_SIZE:
        raise InvalidArgument("block_size", f"must be in [1, {MAX_BLOCK_SIZE}], not {params.block_size}")
    if params.mode is Mode.SPECULATIVE and params.block_size < 2:
        raise InvalidArgument("block_size", 'must be at least 2 in mode "speculative": the first token of a draft is known')
    usable = max(limits.block_size, params.max_tokens)
    if params.mode is Mode.DIFFUSION and params.block_size > usable:
        raise InvalidArgument(
            "block_size",
            f"must be at most {usable} with max_tokens {params.max_tokens}: the rest of the block would be cut off",
        )
    if params.steps < (0 if params.mode is Mode.SPECULATIVE else 1):
        raise InvalidArgument("steps", f"must be at least 1, not {params.steps}")
    if not (0.0 <= params.gamma <= 1.0):  # also refuses NaN
        raise InvalidArgument("gamma", f"must be in [0, 1], not {params.gamma}")
    if not (params.temperature >= 0.0 and math.isfinite(params.temperature)):
        raise InvalidArgument("temperature", f"must be a finite number of at least 0, not {params.temperature}")
    if not 0 <= params.top_k <= MAX_TOP_K:
        raise InvalidArgument("top_k", f"must be in [0, {MAX_TOP_K}] (0: all tokens), not {params.top_k}")
    if not 0.0 < params.top_p <= 1.0:
        raise InvalidArgument("top_p", f"must be in (0, 1], not {params.top_p}")
    if not 0 <= params.seed <= MAX_SEED:
        raise InvalidArgument("seed", f"must be in [0, 2^63), not {params.seed}")
    if len(params.eos_token_ids) > MAX_EOS_TOKENS:
        raise InvalidArgument("eos_token_ids", f"at most {MAX_EOS_TOKENS}, not {len(params.eos_token_ids)}")
    for token in params.eos_token_ids:
        if not 0 <= token < limits.vocab_size:
            raise InvalidArgument("eos_token_ids", f"token {token} is outside the vocabulary [0, {limits.vocab_size})")
    if params.logprobs is not None and not 0 <= params.logprobs <= MAX_LOGPROBS:
        raise InvalidArgument("logprobs", f"must be in [0, {MAX_LOGPROBS}], not {params.logprobs}")
    if params.mode in (Mode.DIFFUSION, Mode.SPECULATIVE) and params.block_size > limits.block_size:
        worse = "text" if params.mode is Mode.DIFFUSION else "drafts"
        trained = limits.block_size
        return [f"block_size {params.block_size} is above the {trained} this checkpoint was trained with: expect worse {worse}"]
    return []


def cut_block(tokens: Sequence[int], remaining: int, eos_token_ids: Sequence[int]) -> tuple[list[int], FinishReason | None]:
    """What of a finished block is shown, and why the text ends with it, if it does.

    `remaining`: tokens that may still be generated. The end-of-sequence token itself is kept.
    """
    shown = list(tokens[:remaining])
    for i, token in enumerate(shown):
        if token in eos_token_ids:
            return shown[: i + 1], FinishReason.STOP
    return shown, FinishReason.LENGTH if len(tokens) >= remaining else None
