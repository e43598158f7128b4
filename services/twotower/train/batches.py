"""Examples as rectangular batches, and the place in the endless stream of them."""

from __future__ import annotations

import itertools
import os
import random
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from multiprocessing import get_context
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from twotower.train.bpe import EOS
from twotower.train.corpus import Example

Batch = TypeVar("Batch")


@dataclass(frozen=True, slots=True)
class SequenceBatch:
    """Whole texts, padded on the right; what is padding has weight 0."""

    tokens: Tensor
    """(B, N) int32."""
    weights: Tensor
    """(B, N) fp32: how much the prediction *of* each token counts."""


@dataclass(frozen=True, slots=True)
class BlockBatch:
    """Prompts that end together, each followed by its completion in blocks."""

    tokens: Tensor
    """(B, prompt + blocks * block); the end-of-sequence token fills up behind the end, and before the start."""
    starts: Tensor
    """(B,) int64: where each prompt starts."""
    prompt: int
    """Where the prompts end, and the first block starts."""
    block: int
    """Tokens of a block."""
    counts: Tensor
    """(B, blocks) bool: blocks that hold something of the completion."""


def sequence_batches(examples: list[Example], rows: int, prompt_weight: float, rng: random.Random) -> list[SequenceBatch]:
    """Texts of like length together, about `rows` texts of average length in a batch, in random order."""
    order = sorted(examples, key=_length)
    batches = [_sequences(group, prompt_weight) for group in _fill(order, _budget(order, rows))]
    rng.shuffle(batches)
    return batches


def _length(e: Example) -> int:
    return len(e.prompt) + len(e.completion)


def _budget(examples: Sequence[Example], rows: int) -> int:
    """Tokens of so many texts of average length."""
    return rows * sum(map(_length, examples)) // max(1, len(examples))


def _fill(examples: Sequence[Example], tokens: int) -> Iterator[list[Example]]:
    """Cut into groups that take at most so many tokens if all are as long as the longest."""
    group: list[Example] = []
    longest = 0
    for example in examples:
        longest = max(longest, _length(example))
        if group and (len(group) + 1) * longest > tokens:
            yield group
            group, longest = [], _length(example)
        group.append(example)
    if group:
        yield group


def _sequences(group: list[Example], prompt_weight: float) -> SequenceBatch:
    width = max(map(_length, group))
    tokens = np.full((len(group), width), EOS, dtype=np.int32)
    weights = np.zeros((len(group), width), dtype=np.float32)
    for i, e in enumerate(group):
        end = _length(e)
        tokens[i, :end] = e.prompt + e.completion
        weights[i, : len(e.prompt)] = prompt_weight
        weights[i, len(e.prompt) : end] = 1.0
    return SequenceBatch(torch.from_numpy(tokens), torch.from_numpy(weights))


PROMPT_STEP = 16
"""Prompts in a batch differ by less."""


def block_batches(examples: list[Example], rows: int, blocks: Mapping[int, float], rng: random.Random) -> list[BlockBatch]:
    """Prompts and completions of like length together, about `rows` texts of average length in a batch, in random order.

    blocks: block size -> how often a batch has it. Of a text that is cut off, the last part of a block is left out.
    """

    def key(e: Example) -> tuple[int, int]:
        return len(e.prompt) // PROMPT_STEP, len(e.completion)

    sizes, shares = zip(*blocks.items(), strict=True)
    budget = _budget(examples, rows)
    batches = []
    for _, members in groupby(sorted(examples, key=key), key=lambda e: len(e.prompt) // PROMPT_STEP):
        for group in _fill(list(members), budget):
            block = rng.choices(sizes, shares)[0]
            whole = [e for e in (_whole_blocks(e, block) for e in group) if e.completion]
            if whole:
                batches.append(_blocks(whole, block))
    rng.shuffle(batches)
    return batches


def _whole_blocks(e: Example, block: int) -> Example:
    if not e.open_end:
        return e
    return Example(e.prompt, e.completion[: len(e.completion) // block * block], open_end=True)


def _blocks(group: list[Example], block: int) -> BlockBatch:
    needed = [-(-len(e.completion) // block) for e in group]
    prompt = max(len(e.prompt) for e in group)
    tokens = np.full((len(group), prompt + max(needed) * block), EOS, dtype=np.int32)
    counts = np.zeros((len(group), max(needed)), dtype=bool)
    starts = np.array([prompt - len(e.prompt) for e in group], dtype=np.int64)
    for i, e in enumerate(group):
        tokens[i, starts[i] : prompt + len(e.completion)] = e.prompt + e.completion
        counts[i, : needed[i]] = True
    return BlockBatch(torch.from_numpy(tokens), torch.from_numpy(starts), prompt, block, torch.from_numpy(counts))


@dataclass(slots=True)
class Place:
    """Where a run is in the stream of batches."""

    pool: int = 0
    batch: int = 0
    """Batches of the pool that are used up."""


def stream(make_pool: Callable[[int], list[Batch]], place: Place, workers: int = 0) -> Iterator[Batch]:
    """Batches from `place` on, for ever; `place` is kept up to date.

    workers: processes that make pools ahead, each a function of its number; 0: made here, when they are needed.
    """
    for pool in map(make_pool, itertools.count(place.pool)) if workers == 0 else _made_ahead(make_pool, place.pool, workers):
        while place.batch < len(pool):
            place.batch += 1
            yield pool[place.batch - 1]
        place.pool, place.batch = place.pool + 1, 0


def _made_ahead(make_pool: Callable[[int], list[Batch]], first: int, workers: int) -> Iterator[list[Batch]]:
    """Pools in their order, from processes that start anew: a forked one must not touch a GPU that its parent uses."""
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_alone) as processes:
        ahead = deque(processes.submit(make_pool, first + i) for i in range(workers + 2))
        try:
            for number in itertools.count(first + len(ahead)):
                pool = ahead.popleft().result()
                ahead.append(processes.submit(make_pool, number))
                yield pool
        finally:
            processes.shutdown(wait=False, cancel_futures=True)


def _alone() -> None:
    """A worker is one of many: it computes on one core."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on the device. It waits for nothing that a GPU is still doing: an unpinned one would."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
