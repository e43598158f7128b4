"""Training of the denoiser: block-wise masked diffusion against a frozen context tower."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F

from twotower.model.context_tower import ContextTower
from twotower.model.denoiser_tower import DenoiserTower
from twotower.train.batches import BlockBatch, Place, block_batches, stream
from twotower.train.corpus import Source, encode
from twotower.train.forward import BlockSeeds, Usage, block_logits, block_seeds


class DenoiserTask:
    """Cross entropy on the masked tokens of every block of the completions.

    A share `all_masked` of the blocks is masked whole, as every refinement starts; in the others the masked share is
    uniform. A share `own_order` of the batches is masked as the model's own refinement would have it at some point:
    the most certain tokens are known. The others are masked at random.
    """

    def __init__(
        self,
        model: DenoiserTower,
        context: ContextTower,
        source: Source,
        tokenizer: Tokenizer,
        *,
        rows: int,
        all_masked: float,
        own_order: float,
        bf16: bool,
    ) -> None:
        self.model, self.context = model, context
        self._source, self._tokenizer = source, tokenizer
        self._rows, self._bf16 = rows, bf16
        self._all_masked, self._own_order = all_masked, own_order
        self._block, self._mask_id = model.config.block_size, model.config.mask_token_id
        self._device = model.device
        context.requires_grad_(False).eval()
        model.train()

    def batches(self, place: Place) -> Iterator[BlockBatch]:
        """See `Task.batches`."""

        def pool(number: int) -> list[BlockBatch]:
            examples = encode(self._tokenizer, self._source(number))
            return block_batches(examples, self._rows, self._block, random.Random(number))

        return stream(pool, place)

    def loss(self, batch: BlockBatch, generator: torch.Generator, usage: Usage) -> tuple[Tensor, int]:
        """See `Task.loss`."""
        device = self._device
        tokens = batch.tokens.to(device)
        clean = tokens[:, batch.prompt :].unflatten(1, (-1, self._block))
        # All chance is drawn on the CPU: equal for equal seeds on any device.
        masked = draw_counts(clean.shape[:2], self._block, self._all_masked, generator).to(device)
        order = torch.rand(clean.shape, generator=generator).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=self._bf16):
            seeds = block_seeds(self.context, tokens, batch.prompt, self._block)
            if torch.rand((), generator=generator) < self._own_order:
                order = self._by_certainty(clean, masked, order, seeds, generator)
            mask = order.argsort(-1).argsort(-1) < masked.unsqueeze(-1)
            noisy = clean.masked_fill(mask, self._mask_id)
            logits = block_logits(self.model, noisy, masked / self._block, seeds, usage)
        scored = mask & batch.counts.unsqueeze(-1).to(device)
        losses = F.cross_entropy(logits[scored], clean[scored], reduction="none")
        return losses.mean(), clean.numel()

    @torch.no_grad()
    def _by_certainty(
        self, clean: Tensor, masked: Tensor, order: Tensor, seeds: BlockSeeds, generator: torch.Generator
    ) -> Tensor:
        """Order by the model's certainty at an earlier point of the refinement: the least certain first."""
        block = self._block
        # An earlier point: between what is masked now and everything.
        earlier = masked + ((block - masked + 1) * torch.rand(masked.shape, generator=generator).to(masked.device)).long()
        known = order.argsort(-1).argsort(-1) >= earlier.unsqueeze(-1)
        logits = block_logits(self.model, clean.masked_fill(~known, self._mask_id), earlier / block, seeds)
        logits[..., self._mask_id] = -torch.inf
        return logits.softmax(-1).amax(-1) + known * 2.0


def draw_counts(shape: torch.Size, block: int, all_masked: float, generator: torch.Generator) -> Tensor:
    """How many tokens of each block are masked, in 1..block.

    t is uniform in (0, 1], stratified over the batch; beyond that, a share `all_masked` of the blocks has t = 1.
    """
    n = shape.numel()
    t = (torch.randperm(n, generator=generator) + torch.rand(n, generator=generator)) / n
    t = (t / (1 - all_masked)).clamp(max=1.0) if all_masked < 1 else torch.ones(n)
    return (1 + (t * block).floor()).clamp(max=block).long().view(shape)


def weights_hash(tower: ContextTower) -> str:
    """Equal for equal weights: to hold the frozen tower to its word."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tower.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
