"""One block on its way from all masks to all tokens."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from twotower.errors import NonFiniteLogits
from twotower.model.state import ContextState
from twotower.request import BlockStep, GenerationParams, TokenLogprob


class Refinement:
    """A block of one session, at its own step. `DenoiserEngine.step` advances many of them together."""

    def __init__(self, params: GenerationParams, state: ContextState, generated: int, mask_id: int) -> None:
        self.params = params
        self.state = state
        """The session's state at the block's start; read only."""
        self.generated = generated
        """Tokens generated before this block."""
        self.tokens: Tensor = torch.full((params.block_size,), mask_id, dtype=torch.int64)
        self.masked: Tensor = torch.ones(params.block_size, dtype=torch.bool)
        self.left = params.block_size
        """Positions still masked."""
        self.forwards = 0
        self.error: NonFiniteLogits | None = None
        self.step: BlockStep | None = None
        """What the last forward made of it, if the request wants to see that."""
        self._logprobs: dict[int, TokenLogprob] = {}

    @property
    def done(self) -> bool:
        """Nothing is masked, or the block failed."""
        return self.left == 0 or self.error is not None

    @property
    def masked_share(self) -> float:
        """t of the next forward."""
        return self.left / self.params.block_size

    @property
    def steps_left(self) -> int:
        """Forwards that remain, the next one included."""
        return self.params.steps - self.forwards

    @property
    def logprobs(self) -> tuple[TokenLogprob, ...]:
        """Of the tokens committed so far, by position; empty if not asked for."""
        return tuple(self._logprobs[position] for position in sorted(self._logprobs))

    def advance(
        self, tokens: Tensor, masked: Tensor, left: int, finite: bool, logprobs: Mapping[int, TokenLogprob] | None = None
    ) -> None:
        """Take the result of a forward: tokens and masked (L,); logprobs, by position, of what it committed."""
        self.forwards += 1
        if not finite:
            self.error = NonFiniteLogits("the denoiser's logits are not finite")
            return
        self.tokens, self.masked, self.left = tokens, masked, left
        self._logprobs.update(logprobs or {})
