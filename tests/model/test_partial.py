"""A commit of which only the first tokens stay: the bits of the worker that applies its delta, and what AR steps give."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.support.checkpoints import write_tiny_checkpoint
from twotower.cli.options import DEFAULT_CHECKPOINT
from twotower.model.checkpoint import Checkpoint
from twotower.model.context_tower import ContextTower
from twotower.model.delta_batch import DeltaBatch, apply_batch
from twotower.model.pool import PAGE, PoolSize, StatePool
from twotower.model.state import ContextState, Delta
from twotower.model.weights import load_context_tower
from twotower.wire.state import delta_spec, delta_tensors
from twotower_kernels.cpu.build import load

CPU = torch.device("cpu")
FORMS = [
    pytest.param("torch", torch.float32, id="plain-fp32"),
    pytest.param("torch", torch.bfloat16, id="plain-bf16"),
    pytest.param("cpu", torch.bfloat16, id="cpp-bf16", marks=pytest.mark.skipif(load() is None, reason="no C++ kernels")),
    pytest.param("triton", torch.bfloat16, id="triton-bf16"),
]


def _tower(directory: Path, form: str, dtype: torch.dtype) -> ContextTower:
    if form == "triton":
        pytest.importorskip("triton")
        from twotower_kernels.triton.common import interpreted

        if not interpreted():
            pytest.skip("of the interpreter; on a GPU see test_triton_towers")
        few = write_tiny_checkpoint(directory, hybrid_override_pattern="M*M", num_hidden_layers=3)  # it is slow
        return load_context_tower(Checkpoint.open(few), dtype, CPU, kernels=form)
    checkpoint = DEFAULT_CHECKPOINT if form == "cpu" else write_tiny_checkpoint(directory)
    return load_context_tower(Checkpoint.open(checkpoint), dtype, CPU, kernels=form)


def _tokens(count: int, seed: int) -> Tensor:
    return torch.randint(4, 96, (count,), generator=torch.Generator().manual_seed(seed))


def _tensors(state: ContextState) -> list[Tensor]:
    mamba = [tensor for layer in state.mamba.values() for tensor in (layer.conv, layer.ssm)]
    return [*mamba, *(tensor for layer in state.kv.values() for tensor in layer.slice(0, state.length))]


def _same(a: ContextState, b: ContextState) -> bool:
    return a.length == b.length and all(map(torch.equal, _tensors(a), _tensors(b)))


def _copies(tower: ContextTower, states: Sequence[ContextState], *, pooled: bool) -> list[ContextState]:
    copies = _empty(tower, [state.length for state in states], pooled=pooled)
    for copy, state in zip(copies, states, strict=True):
        copy.length = state.length
        for i, layer in state.mamba.items():
            copy.mamba[i].conv.copy_(layer.conv)
            copy.mamba[i].ssm.copy_(layer.ssm)
        for i, kv in state.kv.items():
            copy.kv[i].write(0, *kv.slice(0, state.length))
    return copies


def _empty(tower: ContextTower, lengths: Sequence[int], *, pooled: bool) -> list[ContextState]:
    """With room for these lengths and more; of a pool, in slots and pages that are no neighbours."""
    if not pooled:
        return [tower.new_state() for _ in lengths]
    pool = StatePool(tower.config, tower.dtype, CPU, PoolSize(2 * len(lengths), 6 * len(lengths)))
    for tensor in (*pool.kv.values(), *pool.ssm.values(), *pool.conv.values()):
        tensor.fill_(float("nan"))
    pairs = [(pool.acquire(1), pool.acquire(length + 2 * PAGE)) for length in lengths]
    for gap, _ in pairs:
        pool.release(gap)
    return [state for _, state in pairs]


def _states(tower: ContextTower, lengths: Sequence[int], *, pooled: bool) -> list[ContextState]:
    """Sessions after prompts."""
    states = _empty(tower, lengths, pooled=pooled)
    for i, (state, length) in enumerate(zip(states, lengths, strict=True)):
        if length:
            tower.prefill([_tokens(length, i)], [state], need_logits=False)
        else:
            state.begin()
    return states


@pytest.mark.parametrize(("form", "dtype"), FORMS)
@pytest.mark.parametrize("pooled", [True, False])
def test_workers_have_the_bits_and_all_tokens_are_a_commit(tmp_path: Path, form: str, dtype: torch.dtype, pooled: bool) -> None:
    if form == "triton" and not pooled:
        pytest.skip("its pages are a pool's")
    tower, rng = _tower(tmp_path, form, dtype), random.Random(0)
    rates, lengths = tower.decay_rates(), (0, 1, 30, 20, 3)
    states = _states(tower, lengths, pooled=pooled)
    workers, followers = (_copies(tower, states, pooled=pool) for pool in (False, True))
    kernel = tower.config.conv_kernel
    for round_, size in enumerate((16, 16, 5, 1) if form != "triton" else (8,)):
        blocks = torch.stack([_tokens(size, 100 * round_ + i) for i in range(len(states))])
        counts = [min(n, size) for n in (1, kernel - 2, kernel - 1, rng.randrange(1, size + 1), size)]
        whole = _copies(tower, states, pooled=pooled)
        before = [tensor.clone() for state in states for tensor in _tensors(state)]
        found = tower.verify(blocks, states)
        assert all(map(torch.equal, before, [tensor for state in states for tensor in _tensors(state)]))
        assert found.logits is not None
        assert found.logits.shape == (len(states), size, tower.config.vocab_size)
        accepted = tower.accept(states, found, counts)
        assert accepted.counts == tuple(counts)
        deltas = [accepted.row(i) for i in range(len(states))]
        for state, worker, delta, count in zip(states, workers, deltas, counts, strict=True):
            assert delta.length == count
            spec = delta_spec(tower.config, tower.dtype, 1, count)
            assert {key: (one.dtype, tuple(one.shape)) for key, one in delta_tensors(DeltaBatch.of(delta))} == {
                key: (one.dtype, one.shape) for key, one in spec.items()
            }
            worker.apply(_sent(delta), rates, tower.kernels)
            assert _same(state, worker)
        apply_batch(followers, accepted, rates, tower.kernels)
        assert all(map(_same, states, followers))
        if not tower.kernels.paged:
            at_once = _copies(tower, whole, pooled=pooled)
            together = tower.accept_all(at_once, tower.verify(blocks, at_once, need_logits=False))
        committed, last = tower.commit(blocks, whole, need_logits=True)
        if not tower.kernels.paged:
            assert all(map(_same, at_once, whole))
            for i, delta in enumerate(committed):
                assert all(map(torch.equal, _parts(together.row(i)), _parts(delta)))
        assert last is not None
        full = [i for i, count in enumerate(counts) if count == size]
        assert full
        for i in full:
            assert _same(states[i], whole[i])
            assert all(map(torch.equal, _parts(deltas[i]), _parts(committed[i])))
            assert torch.equal(found.logits[i, -1], last[i])


def _parts(delta: Delta) -> list[Tensor]:
    return [tensor for _, tensor in delta_tensors(DeltaBatch.of(delta))]


def _sent(delta: Delta) -> Delta:
    """With tensors of its own, as a worker gets them."""
    layers = {
        i: type(change)(*(getattr(change, name).clone() for name in change.__slots__)) for i, change in delta.layers.items()
    }
    return Delta(delta.length, layers)


@pytest.mark.parametrize("pooled", [True, False])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 9, 16])
def test_the_state_and_the_logits_are_those_of_ar_steps(count: int, pooled: bool) -> None:
    """In fp32, within 1e-5 of the largest value: the order of sums in a forward of 16 rows is another than in one of 1."""
    tower = load_context_tower(Checkpoint.open(DEFAULT_CHECKPOINT), torch.float32, CPU, kernels="torch")
    states, stepped = (_states(tower, (0, 37, 2), pooled=pooled) for _ in range(2))
    blocks = torch.stack([_tokens(16, i) for i in range(3)])
    found = tower.verify(blocks, states)
    assert found.logits is not None
    tower.accept(states, found, [count] * 3)
    for at in range(count):
        _, logits = tower.commit(blocks[:, at : at + 1], stepped, need_logits=True)
        assert logits is not None
        _near(found.logits[:, at], logits)
    for state, other in zip(states, stepped, strict=True):
        assert state.length == other.length
        for mine, theirs in zip(_tensors(state), _tensors(other), strict=True):
            _near(mine, theirs)


def _near(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@pytest.mark.skipif(load() is None, reason="no AVX-512 BF16, or no compiler")
def test_rows_that_share_a_forward_have_the_bits_of_each_alone() -> None:
    """By the C++ kernels in bf16, whatever the others keep; drafted tokens that were not kept leave nothing behind."""
    tower = load_context_tower(Checkpoint.open(DEFAULT_CHECKPOINT), torch.bfloat16, CPU, kernels="cpu")
    lengths, counts = (5, 0, 64, 33), (3, 16, 1, 8)
    together, alone = _states(tower, lengths, pooled=True), _states(tower, lengths, pooled=False)
    drafts = torch.stack([_tokens(16, i) for i in range(4)])
    found = tower.verify(drafts, together)
    assert found.logits is not None
    tower.accept(together, found, counts)
    for row, (state, count) in enumerate(zip(alone, counts, strict=True)):
        drafts[row, count:] = 7  # another draft, of which as much is kept
        own = tower.verify(drafts[row : row + 1], [state])
        assert own.logits is not None
        tower.accept([state], own, [count])
        assert torch.equal(own.logits[0, :count], found.logits[row, :count])
        assert _same(state, together[row])
    blocks = torch.stack([_tokens(16, 50 + i) for i in range(4)])
    tower.commit(blocks, together)
    for row, state in enumerate(alone):
        tower.commit(blocks[row : row + 1], [state])
        assert _same(state, together[row])


def test_counts_must_fit(tmp_path: Path) -> None:
    tower = _tower(tmp_path, "torch", torch.float32)
    states = _states(tower, (4,), pooled=False)
    found = tower.verify(_tokens(8, 0).unsqueeze(0), states, need_logits=False)
    assert found.logits is None
    for count in (0, 9):
        with pytest.raises(AssertionError):
            tower.accept(states, found, [count])
