"""A generation as its tower holds it: what has been read and written, and the state that this made."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from torch import Tensor

from twotower.model.state import ContextState
from twotower.request import FinishReason, GenerationParams, Mode, TokenLogprob, cut_block


def block_tokens(params: GenerationParams) -> int:
    """Tokens that one commit takes into the state."""
    return params.block_size if params.mode is Mode.DIFFUSION else 1


def room_for(known: int, generated: int, params: GenerationParams) -> int:
    """Tokens that the state of a session must have room for, of which the first `known` are given.

    generated: how many of these, at the end, count against max_tokens.
    """
    block = block_tokens(params)
    blocks = -(-(params.max_tokens - generated) // block)
    return known + blocks * block


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
    """Prompt, parameters, state, and how far it has come. It belongs to the loop of its tower, or to whoever made it."""

    def __init__(
        self, session_id: str, tokens: Sequence[int], params: GenerationParams, state: ContextState, generated: int = 0
    ) -> None:
        """tokens: all that are known, of which the last `generated` were written elsewhere: whole blocks.

        These are taken into the state by commits, as they were there, so that its bits are the same.
        """
        prompt_end, block = len(tokens) - generated, block_tokens(params)
        self.id = session_id
        self.prompt = list(tokens[:prompt_end])
        self.params = params
        self.state = state
        self.room = room_for(len(tokens), generated, params)
        """Tokens that the state will hold at most."""
        self.transcript = Transcript(params, generated)
        self.written = list(tokens[prompt_end:])
        """What has been written so far; after the beginning, kept in AR mode only."""
        self.blocks = deque(self.written[i : i + block] for i in range(0, generated, block))
        """Blocks that are written, but not yet in the state."""
        self.logits: Tensor | None = None
        """(vocab,) of the next token, in AR mode."""
        self.pending: int | None = None
        """In AR mode, the token that is written but not yet in the state; the next step takes it."""
        self.logprobs: tuple[TokenLogprob, ...] = ()
        """Of `pending`, if asked for."""
        if params.mode is not Mode.DIFFUSION and self.blocks:
            (self.pending,) = self.blocks.pop()

    def rewrite(self) -> None:
        """Have all that is written taken into the state again: in AR mode, or before anything was committed."""
        if self.params.mode is not Mode.DIFFUSION and self.written:
            self.blocks = deque([token] for token in self.written[:-1])
            self.pending = self.written[-1]

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
