"""Examples as rectangular batches, and the position in their endless stream."""

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
    """Whole texts, padded on the right; padding has weight 0."""

    tokens: Tensor
    """(B, N) int32."""
    weights: Tensor
    """(B, N) fp32: the weight of the prediction *of* each token."""


@dataclass(frozen=True, slots=True)
class BlockBatch:
    """Prompts that end at the same position, each followed by its completion in blocks."""

    tokens: Tensor
    """(B, prompt + blocks * block); the end-of-sequence token pads after the end, and before the start."""
    starts: Tensor
    """(B,) int64: where each prompt starts."""
    prompt: int
    """The position where the prompts end and the first block starts."""
    block: int
    """Tokens of a block."""
    counts: Tensor
    """(B, blocks) bool: whether a block holds tokens of the completion."""


def sequence_batches(examples: list[Example], rows: int, prompt_weight: float, rng: random.Random) -> list[SequenceBatch]:
    """Batches of texts of similar length, about `rows` texts of average length each, in random order."""
    order = sorted(examples, key=_length)
    batches = [_sequences(group, prompt_weight) for group in _fill(order, _budget(order, rows))]
    rng.shuffle(batches)
    return batches


def _length(e: Example) -> int:
    return len(e.prompt) + len(e.completion)


def _budget(examples: Sequence[Example], rows: int) -> int:
    """Tokens of `rows` texts of average length."""
    return rows * sum(map(_length, examples)) // max(1, len(examples))


def _fill(examples: Sequence[Example], tokens: int) -> Iterator[list[Example]]:
    """Cut into groups that take at most `tokens` tokens when all texts are padded to the longest."""
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
"""The lengths of prompts in a batch differ by less than this."""


def block_batches(examples: list[Example], rows: int, blocks: Mapping[int, float], rng: random.Random) -> list[BlockBatch]:
    """Batches of prompts and completions of similar length, about `rows` texts of average length each, in random order.

    blocks: block size -> its share of the batches. The partial last block of a text that is cut off is left out.
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
    """A run's position in the stream of batches."""

    pool: int = 0
    batch: int = 0
    """Batches of the pool that have been used."""


def stream(make_pool: Callable[[int], list[Batch]], place: Place, workers: int = 0) -> Iterator[Batch]:
    """An endless stream of batches from `place` on; `place` is kept up to date.

    workers: processes that make pools, which depend on their number only, ahead of time; 0: pools are made here on demand.
    """
    for pool in map(make_pool, itertools.count(place.pool)) if workers == 0 else _made_ahead(make_pool, place.pool, workers):
        while place.batch < len(pool):
            place.batch += 1
            yield pool[place.batch - 1]
        place.pool, place.batch = place.pool + 1, 0


def _made_ahead(make_pool: Callable[[int], list[Batch]], first: int, workers: int) -> Iterator[list[Batch]]:
    """Pools in order, from spawned processes: a forked process must not touch a GPU that its parent uses."""
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
    """Restrict this worker to one core, since it is one of many."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on the device. It is pinned first, since an unpinned copy would wait for the GPU's pending work."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
