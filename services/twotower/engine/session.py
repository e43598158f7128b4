"""A generation as its tower holds it: what has been read and written, and the state that this made."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from twotower.model.state import ContextState
from twotower.request import FinishReason, GenerationParams, Mode, TokenLogprob, cut_block

STEP = 0
"""Among a session's rounds: one token, by an AR step."""


class Piece(NamedTuple):
    """Tokens that one forward reads, and how many of them it takes into the state."""

    tokens: list[int]
    kept: int | None
    """How many of the first ones. None: the tokens are a draft, and its verification decides."""


def block_tokens(params: GenerationParams) -> int:
    """Tokens of which a generation is made, where it can go on in another process."""
    return params.block_size if params.mode is Mode.DIFFUSION else 1


def room_for(known: int, generated: int, params: GenerationParams) -> int:
    """Tokens that the state of a session must have room for, of which the first `known` are given.

    generated: how many of these, at the end, count against max_tokens.
    """
    block = block_tokens(params)
    blocks = -(-(params.max_tokens - generated) // block)
    beyond = params.block_size if params.mode is Mode.SPECULATIVE else 0  # a draft may reach beyond the end
    return known + blocks * block + beyond


class Transcript:
    """How much of a generation has been written, and why it ended, if it has."""

    def __init__(self, params: GenerationParams, generated: int = 0) -> None:
        self._params = params
        self.generated = generated
        """Tokens written so far."""
        self.finish_reason: FinishReason | None = None

    def emit(self, tokens: Sequence[int]) -> list[int]:
        """Count a finished block; returns what of it is shown, and sets `finish_reason` if it is the last."""
        remaining = self._params.max_tokens - self.generated
        shown, self.finish_reason = cut_block(tokens, remaining, self._params.eos_token_ids)
        self.generated += len(shown)
        return shown


class Session:
    """Prompt, parameters, state, and how far it has come. It belongs to the loop of its tower, or to the code that opened it.

    In the autoregressive modes the last token is written before the state holds it: it is `pending`. An AR
    step takes it, and so does a round, whose draft begins with it.
    """

    def __init__(
        self,
        session_id: str,
        tokens: Sequence[int],
        params: GenerationParams,
        state: ContextState,
        generated: int = 0,
        rounds: Sequence[int] = (),
    ) -> None:
        """tokens: all that are known, of which the last `generated` were written elsewhere: whole blocks.

        These are taken into the state by commits, as they were there, so that its bits are the same; rounds: how they were in
        an autoregressive mode, as in `rounds`; empty: all by steps.
        """
        prompt_end = len(tokens) - generated
        self.id = session_id
        self.prompt = list(tokens[:prompt_end])
        self.params = params
        self.state = state
        self.transcript = Transcript(params, generated)
        self.written = list(tokens[prompt_end:])
        """What has been written so far; after the beginning, kept in the autoregressive modes only."""
        self.blocks: deque[Piece] = deque()
        """What is written, or drafted, but not yet in the state."""
        self.rounds: list[int] = []
        """In the autoregressive modes, how `written` became part of the state, but for its last token: by a verified draft, of
        which this many tokens were kept, or by a `STEP`."""
        self.logits: Tensor | None = None
        """(vocab,) of the next token, in the autoregressive modes."""
        self.pending: int | None = None
        """In the autoregressive modes, the token that is written but not yet in the state."""
        self.logprobs: tuple[TokenLogprob, ...] = ()
        """Of `pending`, if asked for."""
        if params.mode is Mode.DIFFUSION:
            size = params.block_size
            self.blocks.extend(Piece(self.written[i : i + size], size) for i in range(0, generated, size))
        elif self.written:
            self.rounds = list(rounds) or [STEP] * (generated - 1)
            self.rewrite()

    def rewrite(self) -> None:
        """Have all that is written taken into the state again.

        In diffusion mode `blocks` still holds it, as this is not called there after a commit.
        """
        if self.params.mode is Mode.DIFFUSION or not self.written:
            return
        self.blocks.clear()
        self.pending = self.written[-1]
        at = 0
        for kept in self.rounds:
            taken = max(kept, 1)
            tokens = self.written[at : at + taken]
            if kept != STEP:  # what was refused had no part in the bits of what was kept: anything stands for it
                tokens += tokens[-1:] * (self.params.block_size - kept)
            self.blocks.append(Piece(tokens, taken))
            at += taken
        assert at == len(self.written) - 1

    @property
    def prefill_left(self) -> int:
        """Prompt tokens that the state does not hold yet."""
        return max(0, len(self.prompt) - self.state.length)

    @property
    def generated(self) -> int:
        """Tokens written so far."""
        return self.transcript.generated

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why the generation is over; None while it goes on."""
        return self.transcript.finish_reason

    def emit(self, tokens: Sequence[int]) -> list[int]:
        """See `Transcript.emit`."""
        shown = self.transcript.emit(tokens)
        if self.params.mode is not Mode.DIFFUSION:
            self.written += shown
        return shown
