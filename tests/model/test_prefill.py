"""Prompts that are read together: each has the state and the logits that it has alone."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.checkpoints import write_tiny_checkpoint
from twotower.cli.options import DEFAULT_CHECKPOINT
from twotower.model.checkpoint import Checkpoint
from twotower.model.context_tower import ContextTower
from twotower.model.pool import PAGE, PoolSize, StatePool
from twotower.model.state import ContextState
from twotower.model.weights import load_context_tower
from twotower_kernels.cpu.build import load

CPU = torch.device("cpu")


def _exact() -> ContextTower:
    """The shipped checkpoint by the C++ kernels in bf16, which promise a row's bits whatever is beside it."""
    return load_context_tower(Checkpoint.open(DEFAULT_CHECKPOINT), torch.bfloat16, CPU, kernels="cpu")


def _near(directory: Path, dtype: torch.dtype, **changes: Any) -> ContextTower:
    return load_context_tower(Checkpoint.open(write_tiny_checkpoint(directory, **changes)), dtype, CPU, kernels="torch")


def _tokens(count: int, seed: int) -> Tensor:
    return torch.randint(4, 96, (count,), generator=torch.Generator().manual_seed(seed))


def _tensors(state: ContextState) -> list[Tensor]:
    mamba = [tensor for layer in state.mamba.values() for tensor in (layer.conv, layer.ssm)]
    return [*mamba, *(tensor for layer in state.kv.values() for tensor in layer.slice(0, state.length))]


def _scattered(tower: ContextTower, rooms: Sequence[int]) -> list[ContextState]:
    """States of a pool whose slots and pages are no neighbours, in no order; what they hold is no number."""
    pool = StatePool(tower.config, tower.dtype, CPU, PoolSize(2 * len(rooms), sum(-(-room // PAGE) for room in rooms) * 2))
    for tensor in (*pool.kv.values(), *pool.ssm.values(), *pool.conv.values()):
        tensor.fill_(float("nan"))
    held, gaps = [], []
    for room in rooms:
        gaps.append(pool.acquire(PAGE))
        held.append(pool.acquire(room))
    for gap in gaps:
        pool.release(gap)
    return held[1::2] + held[::2]


def _read(
    tower: ContextTower, chunks: Sequence[Tensor], states: Sequence[ContextState], need: Sequence[bool]
) -> list[Tensor | None]:
    """One by one."""
    return [tower.prefill([c], [s], need_logits=n)[0] for c, s, n in zip(chunks, states, need, strict=True)]


@pytest.mark.skipif(load() is None, reason="no AVX-512 BF16, or no compiler")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("pooled", [True, False])
def test_bits_are_those_of_each_alone(pooled: bool, threads: int) -> None:
    """Random raggedness: chunks of 1 to 200 tokens behind contexts of 0 to 600, in any order; then a commit."""
    tower, rng = _exact(), random.Random(threads)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for round_ in range(4):
            count = rng.choice((2, 3, 7, 12))
            lengths = [rng.choice((0, 0, rng.randrange(1, 100), rng.randrange(100, 600))) for _ in range(count)]
            sizes = [rng.choice((1, 2, 63, 64, 65, rng.randrange(1, 200))) for _ in range(count)]
            chunks = [_tokens(size, 100 * round_ + i) for i, size in enumerate(sizes)]
            need = [rng.random() < 0.5 for _ in range(count)]
            alone = [tower.new_state() for _ in range(count)]
            together = _scattered(tower, [900] * count) if pooled else [tower.new_state() for _ in range(count)]
            for i, length in enumerate(lengths):
                for states in (alone, together):
                    if length:
                        tower.prefill([_tokens(length, 10_000 + i)], [states[i]], need_logits=False)
            expected = _read(tower, chunks, alone, need)
            logits = tower.prefill(chunks, together, need_logits=need)
            assert [one is not None for one in logits] == need
            assert all(torch.equal(a, b) for a, b in zip(logits, expected, strict=True) if a is not None and b is not None)
            blocks = torch.stack([_tokens(16, 200 * round_ + i) for i in range(count)])
            for committed in (False, True):
                for a, b in zip(alone, together, strict=True):
                    assert a.length == b.length
                    assert all(map(torch.equal, _tensors(a), _tensors(b)))
                if not committed:
                    tower.commit(blocks, together)
                    for row, state in enumerate(alone):
                        tower.commit(blocks[row : row + 1], [state])
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(load() is None, reason="no AVX-512 BF16, or no compiler")
def test_where_a_prompt_is_cut_does_not_change_its_bits() -> None:
    """At multiples of 64 tokens, which is what the C++ scan takes at a time."""
    tower, rng = _exact(), random.Random(0)
    for round_ in range(6):
        tokens = _tokens(rng.randrange(65, 500), round_)
        whole, cut = tower.new_state(), tower.new_state()
        (expected,) = tower.prefill([tokens], [whole])
        logits = None
        while cut.length < len(tokens):
            chunk = tokens[cut.length : cut.length + 64 * rng.randrange(1, 4)]
            other = _tokens(rng.randrange(1, 100), cut.length)
            logits, _ = tower.prefill([chunk, other], [cut, tower.new_state()])
        assert logits is not None
        assert expected is not None
        assert torch.equal(logits, expected)
        assert all(map(torch.equal, _tensors(cut), _tensors(whole)))


@pytest.mark.parametrize("pooled", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)])
def test_plain_torch_agrees_within_its_rounding(tmp_path: Path, dtype: torch.dtype, tolerance: float, pooled: bool) -> None:
    """No promise of bits there: the products' order of sums depends on how many rows there are."""
    tower, lengths = _near(tmp_path, dtype), (0, 40, 0, 7)
    chunks = [_tokens(size, size) for size in (33, 1, 3, 90)]
    alone = [tower.new_state() for _ in lengths]
    together = _scattered(tower, [200] * 4) if pooled else [tower.new_state() for _ in lengths]
    for i, length in enumerate(lengths):
        for states in (alone, together):
            if length:
                tower.prefill([_tokens(length, i)], [states[i]], need_logits=False)
    expected = _read(tower, chunks, alone, [True] * 4)
    logits = tower.prefill(chunks, together)
    for got, one in zip(logits, expected, strict=True):
        assert got is not None
        assert one is not None
        torch.testing.assert_close(got, one, rtol=tolerance, atol=tolerance * one.abs().max().item())
    for a, b in zip(alone, together, strict=True):
        for got, one in zip(_tensors(b), _tensors(a), strict=True):
            torch.testing.assert_close(got, one, rtol=tolerance, atol=tolerance * one.abs().max().item())


@pytest.mark.parametrize("pattern", ["M*E-M*", "*MEM", "EM"])
def test_logits_of_some_alone(tmp_path: Path, pattern: str) -> None:
    """Whatever layers come last: behind the last that changes a state, only the rows that are wanted go on."""
    tower = _near(tmp_path, torch.float32, hybrid_override_pattern=pattern, num_hidden_layers=len(pattern))
    chunks = [_tokens(size, size) for size in (5, 20, 1)]
    need = [True, False, True]
    some = tower.prefill(chunks, [tower.new_state() for _ in chunks], need_logits=need)
    every = tower.prefill(chunks, [tower.new_state() for _ in chunks])
    assert [one is not None for one in some] == need
    for i in (0, 2):
        got, expected = some[i], every[i]
        assert got is not None
        assert expected is not None
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert tower.prefill(chunks, [tower.new_state() for _ in chunks], need_logits=False) == [None] * 3
