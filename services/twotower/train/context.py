"""Training of the context tower: next-token prediction."""

from __future__ import annotations

import random
from collections.abc import Iterator

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F

from twotower.model.context_tower import ContextTower
from twotower.train.batches import Place, SequenceBatch, sequence_batches, stream
from twotower.train.corpus import Source, encode
from twotower.train.forward import Usage, context_logits


class ContextTask:
    """Cross entropy on completions, and a little on prompts (which are mostly chance)."""

    def __init__(
        self, model: ContextTower, source: Source, tokenizer: Tokenizer, *, rows: int, prompt_weight: float, bf16: bool
    ) -> None:
        self.model = model
        self._source, self._tokenizer = source, tokenizer
        self._rows, self._prompt_weight, self._bf16 = rows, prompt_weight, bf16
        self._device = model.device
        model.train()

    def batches(self, place: Place) -> Iterator[SequenceBatch]:
        """See `Task.batches`."""

        def pool(number: int) -> list[SequenceBatch]:
            examples = encode(self._tokenizer, self._source(number))
            return sequence_batches(examples, self._rows, self._prompt_weight, random.Random(number))

        return stream(pool, place)

    def loss(self, batch: SequenceBatch, generator: torch.Generator, usage: Usage) -> tuple[Tensor, int]:
        """See `Task.loss`."""
        tokens, weights = batch.tokens.to(self._device), batch.weights[:, 1:].flatten().to(self._device)
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._bf16):
            logits = context_logits(self.model, tokens[:, :-1], usage)
        losses = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
        return (losses * weights).sum() / weights.sum(), tokens.numel()
