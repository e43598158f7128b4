"""Training of the denoiser: block-wise masked diffusion against a frozen context tower."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F

from twotower.model.context_tower import ContextTower
from twotower.model.denoiser_tower import DenoiserTower
from twotower.train.batches import BlockBatch, Place, block_batches, stream, to_device
from twotower.train.corpus import Source, encode
from twotower.train.forward import BlockSeeds, Usage, block_logits, block_seeds


@dataclass(frozen=True, slots=True)
class BlockPools:
    """A function from a pool's number to its batches. It can be pickled if the source can."""

    source: Source
    tokenizer: Tokenizer
    rows: int
    """Texts of average length in a batch."""
    blocks: Mapping[int, float]
    """Block size -> its share of the batches."""

    def __call__(self, number: int) -> list[BlockBatch]:
        """See `stream`."""
        examples = encode(self.tokenizer, self.source(number))
        return block_batches(examples, self.rows, self.blocks, random.Random(number))


@dataclass(frozen=True, slots=True)
class Masking:
    """How the blocks of a batch are masked."""

    all_masked: float = 0.3
    """Share of fully masked blocks, as at the start of every refinement; in other blocks the masked share is uniform."""
    own_order: float = 0.3
    """Share of the batches masked as at some point of the model's own refinement; others are masked at random."""
    own_tokens: float = 0.25
    """Share of those batches in which the known tokens, too, are the model's own, including wrong ones."""


class DenoiserTask:
    """Cross entropy on the masked tokens of every block of the completions."""

    def __init__(
        self,
        model: DenoiserTower,
        context: ContextTower,
        pools: BlockPools,
        *,
        masking: Masking,
        bf16: bool,
        workers: int = 0,
    ) -> None:
        self.model, self.context = model, context
        self._pools, self._masking, self._bf16, self._workers = pools, masking, bf16, workers
        self._mask_id = model.config.mask_token_id
        self._device = model.device
        context.requires_grad_(False).eval()
        model.train()

    def batches(self, place: Place) -> Iterator[BlockBatch]:
        """See `Task.batches`."""
        return stream(self._pools, place, self._workers)

    def loss(self, batch: BlockBatch, generator: torch.Generator, usage: Usage) -> tuple[Tensor, int]:
        """See `Task.loss`."""
        device, block = self._device, batch.block
        tokens = to_device(batch.tokens, device).long()
        clean = tokens[:, batch.prompt :].unflatten(1, (-1, block))
        # All random numbers are drawn on the CPU, so that equal seeds give equal numbers on any device.
        masked = to_device(draw_counts(clean.shape[:2], block, self._masking.all_masked, generator), device)
        order = to_device(torch.rand(clean.shape, generator=generator), device)
        own_order, own_tokens = torch.rand(2, generator=generator).tolist()
        with torch.autocast(device.type, torch.bfloat16, enabled=self._bf16):
            seeds = block_seeds(self.context, tokens, batch.prompt, block, to_device(batch.starts, device))
            known = clean
            if own_order < self._masking.own_order:
                order, own = self._by_certainty(clean, masked, order, seeds, generator)
                known = own if own_tokens < self._masking.own_tokens else clean
            mask = order.argsort(-1).argsort(-1) < masked.unsqueeze(-1)
            noisy = known.masked_fill(mask, self._mask_id)
            logits = block_logits(self.model, noisy, masked / block, seeds, usage)
        scored = (mask & to_device(batch.counts, device).unsqueeze(-1)).flatten()
        losses = F.cross_entropy(logits.flatten(0, -2), clean.flatten(), reduction="none")
        return (losses * scored).sum() / scored.sum().clamp(min=1), tokens.numel()

    @torch.no_grad()
    def _by_certainty(
        self, clean: Tensor, masked: Tensor, order: Tensor, seeds: BlockSeeds, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """The model's confidence at an earlier point of the refinement, highest for known tokens, and its tokens there."""
        block = clean.shape[-1]
        # At the earlier point, at least the tokens masked now were masked, and at most all.
        share = to_device(torch.rand(masked.shape, generator=generator), masked.device)
        earlier = masked + ((block - masked + 1) * share).long()
        known = order.argsort(-1).argsort(-1) >= earlier.unsqueeze(-1)
        logits = block_logits(self.model, clean.masked_fill(~known, self._mask_id), earlier / block, seeds)
        logits[..., self._mask_id] = -torch.inf
        certainty, tokens = logits.softmax(-1).max(-1)
        return certainty + known * 2.0, torch.where(known, clean, tokens)


def draw_counts(shape: torch.Size, block: int, all_masked: float, generator: torch.Generator) -> Tensor:
    """The number of masked tokens of each block, in 1..block.

    t is uniform in (0, 1], stratified over the batch; beyond that, a share `all_masked` of the blocks has t = 1.
    """
    n = shape.numel()
    t = (torch.randperm(n, generator=generator) + torch.rand(n, generator=generator)) / n
    t = (t / (1 - all_masked)).clamp(max=1.0) if all_masked < 1 else torch.ones(n)
    return (1 + (t * block).floor()).clamp(max=block).long().view(shape)


def weights_hash(tower: ContextTower) -> str:
    """A hash of the weights, which shows that the frozen tower has not changed."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tower.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
