"""One block on its way from masks to tokens."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from twotower.engine.sampling import ar_uniforms, uniforms
from twotower.errors import NonFiniteLogits
from twotower.model.state import ContextState
from twotower.request import BlockStep, GenerationParams, TokenLogprob


class Refinement:
    """A block of one session, at its own step. `DenoiserEngine.step` advances many of them together."""

    def __init__(
        self,
        params: GenerationParams,
        state: ContextState,
        generated: int,
        mask_id: int,
        known: int | None = None,
        steps: int | None = None,
    ) -> None:
        """known: the block's first token, which makes it a draft; steps: forwards it may take, where not the request's."""
        self.params = params
        self.state = state
        """The session's state at the block's start; read only."""
        self.generated = generated
        """Tokens generated before this block; of a draft, its first token is among them."""
        self.draft = known is not None
        self.steps = steps or params.steps or params.block_size
        self.tokens: Tensor = torch.full((params.block_size,), mask_id, dtype=torch.int64)
        self.masked: Tensor = torch.ones(params.block_size, dtype=torch.bool)
        self.left = params.block_size
        """Positions still masked."""
        if known is not None:
            self.tokens[0], self.masked[0] = known, False
            self.left -= 1
        self.forwards = 0
        self.seconds = 0.0
        """That these took, with all that shared them; kept by the denoiser's loop."""
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
        return self.steps - self.forwards

    @property
    def wants_logprobs(self) -> bool:
        """Whether the request asks for the log probabilities of this tower. Those of a draft are the context tower's."""
        return self.params.logprobs is not None and not self.draft

    @property
    def uniforms(self) -> Tensor:
        """(L,) fp64: what the next forward draws its tokens with. A draft is drawn with what AR draws these tokens with."""
        params, size = self.params, self.params.block_size
        if self.draft:
            return torch.cat([torch.zeros(1, dtype=torch.float64), ar_uniforms(params.seed, self.generated, size - 1)])
        return uniforms(params.seed, self.generated, self.forwards, size)

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
