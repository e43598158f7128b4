"""A generation as the context tower holds it: the only authority on what has been generated."""

from __future__ import annotations

from torch import Tensor

from twotower.model.state import ContextState
from twotower.request import FinishReason, GenerationParams, Mode, TokenLogprob, cut_block


def room_for(known: int, generated: int, params: GenerationParams) -> int:
    """Tokens that the state of a session must have room for, of which the first `known` are given.

    generated: how many of these, at the end, count against max_tokens.
    """
    block = params.block_size if params.mode is Mode.DIFFUSION else 1
    blocks = -(-(params.max_tokens - generated) // block)
    return known + blocks * block


class Session:
    """Prompt, parameters, state, and how far it has come."""

    def __init__(
        self, session_id: str, prompt: list[int], params: GenerationParams, state: ContextState, generated: int = 0
    ) -> None:
        self.id = session_id
        self.prompt = prompt
        """All tokens known at the start; the last `generated` of them were generated elsewhere."""
        self.params = params
        self.state = state
        self.generated = generated
        self.room = room_for(len(prompt), generated, params)
        """Tokens that the state will hold at most."""
        self.finish_reason: FinishReason | None = None
        self.logits: Tensor | None = None
        """(vocab,) of the next token, in AR mode."""
        self.pending: int | None = None
        """The AR token that is emitted but not yet in the state."""
        self.logprobs: tuple[TokenLogprob, ...] = ()
        """Of `pending`, if asked for."""

    @property
    def prefill_left(self) -> int:
        """Prompt tokens that the state does not hold yet."""
        return max(0, len(self.prompt) - self.state.length)

    @property
    def remaining(self) -> int:
        """Tokens that may still be generated."""
        return self.params.max_tokens - self.generated

    def emit(self, tokens: list[int]) -> list[int]:
        """Count a finished block; returns what of it is shown, and sets `finish_reason` if it is the last."""
        shown, self.finish_reason = cut_block(tokens, self.remaining, self.params.eos_token_ids)
        self.generated += len(shown)
        return shown
