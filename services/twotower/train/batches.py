"""Examples as rectangular batches, and the place in the endless stream of them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import TypeVar

import torch
from torch import Tensor

from twotower.train.bpe import EOS
from twotower.train.corpus import Example

Batch = TypeVar("Batch")


@dataclass(frozen=True, slots=True)
class SequenceBatch:
    """Whole texts, padded on the right; what is padding has weight 0."""

    tokens: Tensor
    """(B, N) int64."""
    weights: Tensor
    """(B, N) fp32: how much the prediction *of* each token counts."""


@dataclass(frozen=True, slots=True)
class BlockBatch:
    """Prompts of one length, each followed by its completion in blocks."""

    tokens: Tensor
    """(B, prompt + blocks * block_size) int64; the end-of-sequence token fills up behind the end."""
    prompt: int
    """Length of the prompts; the first block starts here."""
    counts: Tensor
    """(B, blocks) bool: blocks that hold something of the completion."""


def sequence_batches(examples: list[Example], rows: int, prompt_weight: float, rng: random.Random) -> list[SequenceBatch]:
    """Texts of like length together, about `rows` texts of average length in a batch, in random order."""
    order = sorted(examples, key=lambda e: len(e.prompt) + len(e.completion))
    budget = rows * sum(len(e.prompt) + len(e.completion) for e in order) // max(1, len(order))
    groups: list[list[Example]] = [[]]
    for example in order:
        length = len(example.prompt) + len(example.completion)
        if groups[-1] and (len(groups[-1]) + 1) * length > budget:
            groups.append([])
        groups[-1].append(example)
    rng.shuffle(groups)
    return [_sequences(group, prompt_weight) for group in groups]


def _sequences(group: list[Example], prompt_weight: float) -> SequenceBatch:
    width = max(len(e.prompt) + len(e.completion) for e in group)
    tokens = torch.full((len(group), width), EOS)
    weights = torch.zeros(len(group), width)
    for i, e in enumerate(group):
        end = len(e.prompt) + len(e.completion)
        tokens[i, :end] = torch.tensor(e.prompt + e.completion)
        weights[i, : len(e.prompt)] = prompt_weight
        weights[i, len(e.prompt) : end] = 1.0
    return SequenceBatch(tokens, weights)


def block_batches(examples: list[Example], rows: int, block: int, rng: random.Random) -> list[BlockBatch]:
    """Prompts of equal length and completions of like length together, so that the block grid starts where
    every prompt ends: at most `rows` texts in a batch, in random order. Of a text that is cut off, the last
    part of a block is left out."""
    examples = [e for e in (_whole_blocks(e, block) for e in examples) if e.completion]

    def key(e: Example) -> tuple[int, int]:
        return len(e.prompt), -(-len(e.completion) // block)

    batches = []
    for prompt, group in groupby(sorted(examples, key=key), key=lambda e: len(e.prompt)):
        members = list(group)
        parts = -(-len(members) // rows)
        size = -(-len(members) // parts)
        batches += [_blocks(members[i : i + size], prompt, block) for i in range(0, len(members), size)]
    rng.shuffle(batches)
    return batches


def _whole_blocks(e: Example, block: int) -> Example:
    if not e.open_end:
        return e
    return Example(e.prompt, e.completion[: len(e.completion) // block * block], open_end=True)


def _blocks(group: list[Example], prompt: int, block: int) -> BlockBatch:
    blocks = [-(-len(e.completion) // block) for e in group]
    tokens = torch.full((len(group), prompt + max(blocks) * block), EOS)
    counts = torch.zeros(len(group), max(blocks), dtype=torch.bool)
    for i, e in enumerate(group):
        tokens[i, : prompt + len(e.completion)] = torch.tensor(e.prompt + e.completion)
        counts[i, : blocks[i]] = True
    return BlockBatch(tokens, prompt, counts)


@dataclass(slots=True)
class Place:
    """Where a run is in the stream of batches."""

    pool: int = 0
    batch: int = 0
    """Batches of the pool that are used up."""


def stream(make_pool: Callable[[int], list[Batch]], place: Place) -> Iterator[Batch]:
    """Batches from `place` on, for ever; `place` is kept up to date."""
    while True:
        pool = make_pool(place.pool)
        while place.batch < len(pool):
            place.batch += 1
            yield pool[place.batch - 1]
        place.pool, place.batch = place.pool + 1, 0
