"""The quality of towers during training: scores whole greedy texts without generating them one after another.

A greedy text is right, token for token, if and only if every token (every block) is what the model writes after the right
text so far. So one forward scores the AR mode, and at most a block's steps score diffusion, for all blocks of all texts at
once. A right answer in other words counts as wrong here, so the result is a lower bound.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor

from twotower.model.context_tower import ContextTower
from twotower.model.denoiser_tower import DenoiserTower
from twotower.train.batches import BlockBatch, block_batches
from twotower.train.corpus import Text, encode
from twotower.train.families.item import Split
from twotower.train.families.registry import TASKS
from twotower.train.forward import block_logits, block_seeds, context_logits
from twotower_kernels.unmask import unmask


@dataclass(frozen=True, slots=True)
class Probe:
    """The results of a family."""

    exact: float
    """Share of texts that are right token for token."""
    tokens_per_forward: float
    """Tokens per forward up to each text's end; 1 in AR mode."""


def probe_texts(
    tokenizer: Tokenizer, tasks: str, split: Split, seed: int, count: int, block: int
) -> dict[str, list[BlockBatch]]:
    """Family -> batches of `count` tasks."""
    batches = {}
    for name, make in TASKS[tasks].families.items():
        items = itertools.islice(make(split, seed, TASKS[tasks].max_number), count)
        examples = encode(tokenizer, [Text(item.prompt, "\n" + item.completion) for item in items])
        batches[name] = block_batches(examples, count, {block: 1.0}, random.Random(0))
    return batches


@torch.no_grad()
def probe_context(tower: ContextTower, batches: Sequence[BlockBatch], *, eos: int, bf16: bool) -> Probe:
    """Probe the AR mode. Texts are moved to the left, which drops the padding before their starts."""
    right, texts = 0, 0
    for batch in batches:
        tokens = _moved(batch, tower.device)
        with torch.autocast(tower.device.type, torch.bfloat16, enabled=bf16):
            predicted = context_logits(tower, tokens[:, :-1]).argmax(-1)
        prompts = (batch.prompt - batch.starts).to(tower.device).unsqueeze(1)
        places = torch.arange(1, tokens.shape[1], device=tower.device)
        inside = (places >= prompts) & (places < prompts + _ends(batch, eos, tower.device).unsqueeze(1))
        right += int(((predicted == tokens[:, 1:]) | ~inside).all(-1).sum())
        texts += tokens.shape[0]
    return Probe(right / texts, 1.0)


@torch.no_grad()
def probe_denoiser(
    tower: DenoiserTower,
    context: ContextTower,
    batches: Sequence[BlockBatch],
    *,
    gamma: float,
    scale: float = 1.0,
    bf16: bool,
) -> Probe:
    """Probe diffusion at temperature 0. scale: a factor of the head's weights."""
    mask_id, eos = tower.config.mask_token_id, tower.config.eos_token_ids[0]
    right, texts, written, forwards = 0, 0, 0, 0
    for batch in batches:
        device, block = tower.device, batch.block
        tokens = batch.tokens.to(device).long()
        clean = tokens[:, batch.prompt :].unflatten(1, (-1, block))
        counts = batch.counts.to(device)
        noisy, masked = torch.full_like(clean, mask_id), torch.ones_like(clean, dtype=torch.bool)
        rows = clean.shape[0] * clean.shape[1]
        needed = torch.zeros(rows, dtype=torch.int64, device=device)
        full = torch.ones(rows, device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            seeds = block_seeds(context, tokens, batch.prompt, block, batch.starts.to(device))
            for step in range(block):
                if not masked.any():
                    break
                under_way = masked.any(-1).flatten()
                logits = block_logits(tower, noisy, masked.sum(-1) / block, seeds) * scale
                done = unmask(
                    logits.flatten(0, 1),
                    noisy.flatten(0, 1),
                    masked.flatten(0, 1),
                    mask_id=mask_id,
                    gamma=full * gamma,
                    steps_left=torch.full((rows,), block - step, device=device),
                    temperature=full * 0,
                    uniforms=torch.zeros(rows, block, dtype=torch.float64, device=device),
                )
                keep = under_way.unsqueeze(-1)
                noisy = torch.where(keep, done.tokens, noisy.flatten(0, 1)).view_as(clean)
                masked = (done.masked & keep).view_as(clean)
                needed += under_way
        ends = _ends(batch, eos, device)
        places = torch.arange(clean.shape[1] * block, device=device)
        inside = (places < ends.unsqueeze(1)).view_as(clean)
        right += int(((noisy == clean) | ~inside).all(-1).all(-1).sum())
        texts += clean.shape[0]
        written += int(ends.sum())
        forwards += int((needed.view(counts.shape) * counts).sum())
    return Probe(right / texts, written / forwards)


def _ends(batch: BlockBatch, eos: int, device: torch.device) -> Tensor:
    """(B,) the number of tokens of each completion, including its end-of-sequence token."""
    completion = batch.tokens[:, batch.prompt :].to(device)
    return (completion == eos).long().argmax(-1) + 1


def _moved(batch: BlockBatch, device: torch.device) -> Tensor:
    tokens, starts = batch.tokens.to(device).long(), batch.starts.to(device)
    places = torch.arange(tokens.shape[1], device=device)
    return tokens.gather(1, (places + starts.unsqueeze(1)).clamp(max=tokens.shape[1] - 1))
