"""Training of the context tower: next-token prediction."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F

from twotower.model.context_tower import ContextTower
from twotower.train.batches import Place, SequenceBatch, sequence_batches, stream, to_device
from twotower.train.corpus import Source, encode
from twotower.train.forward import Usage, context_logits


@dataclass(frozen=True, slots=True)
class ContextPools:
    """A function from a pool's number to its batches. It can be pickled if the source can."""

    source: Source
    tokenizer: Tokenizer
    rows: int
    """Texts of average length in a batch."""
    prompt_weight: float

    def __call__(self, number: int) -> list[SequenceBatch]:
        """See `stream`."""
        examples = encode(self.tokenizer, self.source(number))
        return sequence_batches(examples, self.rows, self.prompt_weight, random.Random(number))


class ContextTask:
    """Cross entropy on completions, and with a small weight on prompts, which are mostly random."""

    def __init__(self, model: ContextTower, pools: ContextPools, *, bf16: bool, workers: int = 0) -> None:
        self.model = model
        self._pools, self._bf16, self._workers = pools, bf16, workers
        self._device = model.device
        model.train()

    def batches(self, place: Place) -> Iterator[SequenceBatch]:
        """See `Task.batches`."""
        return stream(self._pools, place, self._workers)

    def loss(self, batch: SequenceBatch, generator: torch.Generator, usage: Usage) -> tuple[Tensor, int]:
        """See `Task.loss`."""
        tokens = to_device(batch.tokens, self._device).long()
        weights = to_device(batch.weights, self._device)[:, 1:].flatten()
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._bf16):
            logits = context_logits(self.model, tokens[:, :-1], usage)
        losses = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
        return (losses * weights).sum() / weights.sum(), tokens.numel()
