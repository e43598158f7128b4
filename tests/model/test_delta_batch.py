"""Deltas of a commit, applied together: the same bits as one after the other, and nothing else in the pool changes."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from tests.support.checkpoints import TINY
from twotower.model.config import ATTENTION, MAMBA, ModelConfig
from twotower.model.delta_batch import DeltaBatch, apply_batch
from twotower.model.pool import PAGE, PoolSize, StatePool
from twotower.model.state import ContextState, Delta, KVDelta, MambaDelta
from twotower_kernels.backend import load
from twotower_kernels.block import ScanFactors
from twotower_kernels.kernels import Kernels

CPU = torch.device("cpu")
CONFIG = ModelConfig.from_dict({**TINY, "block_size": 16})
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


@pytest.fixture(params=["torch", "cpu"])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    return load(request.param)


def _random(shape: Sequence[int], dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _deltas(rows: int, length: int, dtype: torch.dtype, seed: int = 0) -> DeltaBatch:
    """As a commit of `rows` blocks makes them, with random bits."""
    layers: dict[int, ScanFactors | KVDelta] = {}
    for i in CONFIG.layers_of(MAMBA):
        seed += 100
        layers[i] = ScanFactors(
            x=_random((rows, length, CONFIG.mamba_num_heads, CONFIG.mamba_head_dim), dtype, seed),
            b=_random((rows, length, CONFIG.n_groups, CONFIG.ssm_state_size), dtype, seed + 1),
            dt=_random((rows, length, CONFIG.mamba_num_heads), torch.float32, seed + 2).abs(),
            conv=_random((rows, CONFIG.conv_dim, CONFIG.conv_kernel), dtype, seed + 3),
        )
    for i in CONFIG.layers_of(ATTENTION):
        seed += 100
        shape = (rows, CONFIG.num_key_value_heads, length, CONFIG.head_dim)
        layers[i] = KVDelta(_random(shape, dtype, seed), _random(shape, dtype, seed + 1))
    return DeltaBatch(length, layers)


RATES = {i: -_random((CONFIG.mamba_num_heads,), torch.float32, i).abs() for i in CONFIG.layers_of(MAMBA)}


def _tensors(pool: StatePool) -> list[Tensor]:
    return [*pool.conv.values(), *pool.ssm.values(), *pool.kv.values()]


def _full_pool(dtype: torch.dtype, slots: int = 6, pages: int = 24) -> StatePool:
    """Every byte is of someone: whatever is written besides what should be shows."""
    pool = StatePool(CONFIG, dtype, CPU, PoolSize(slots, pages))
    for seed, tensor in enumerate(_tensors(pool)):
        tensor.copy_(_random(tensor.shape, dtype, 1000 + seed))
    return pool


def _same_pools(a: StatePool, b: StatePool) -> bool:
    return all(
        torch.equal(x.contiguous().view(torch.uint8), y.contiguous().view(torch.uint8))
        for x, y in zip(_tensors(a), _tensors(b), strict=True)
    )


def _two(dtype: torch.dtype, lengths: Sequence[int], room: int = 3 * PAGE) -> list[tuple[StatePool, list[ContextState]]]:
    """Two pools of the same bits with the same sessions, in slots and pages that do not follow one another."""
    pools = []
    for _ in range(2):
        pool = _full_pool(dtype)
        others = [pool.acquire(PAGE) for _ in range(len(lengths))]
        for other in others[::2]:
            pool.release(other)  # free pages between those of the others
        states = []
        for length in lengths:
            if not pool.fits(room):
                pool.release(others.pop(1))
            states.append(pool.acquire(room))
            states[-1].length = length
        states.reverse()  # nor are the rows in the order of their slots
        pools.append((pool, states))
    return pools


@DTYPES
@pytest.mark.parametrize("length", [1, 16, PAGE + 3])
@pytest.mark.parametrize("lengths", [(0,), (5,), (PAGE - 1, PAGE, 0), (3, 60, 7, PAGE + 9)])
def test_a_batch_has_the_bits_of_its_rows_one_by_one(
    kernels: Kernels, dtype: torch.dtype, length: int, lengths: Sequence[int]
) -> None:
    (pool, states), (expected, apart) = _two(dtype, lengths)
    before = [state.length for state in states]
    for seed in range(2):
        deltas = _deltas(len(lengths), length, dtype, seed)
        if max(state.length for state in states) + length > 3 * PAGE:
            break
        apply_batch(states, deltas, RATES, kernels)
        for row, state in enumerate(apart):
            state.apply(deltas.row(row), RATES, kernels)
        assert _same_pools(pool, expected)
        assert [state.length for state in states] == [state.length for state in apart]
    assert [state.length for state in states] != before


@DTYPES
def test_both_backends_have_the_same_bits(dtype: torch.dtype) -> None:
    (pool, states), (other, same) = _two(dtype, (PAGE - 1, PAGE, 0))
    deltas = _deltas(3, 16, dtype)
    apply_batch(states, deltas, RATES, load("torch"))
    apply_batch(same, deltas, RATES, load("cpu"))
    assert _same_pools(pool, other)


@DTYPES
def test_only_the_states_of_the_batch_change(kernels: Kernels, dtype: torch.dtype) -> None:
    """Rows of sessions that have left are not applied: their slots may be others' by then."""
    (pool, states), (expected, apart) = _two(dtype, (3, 60, 7, PAGE + 9))
    pool.release(states.pop(1))
    heir = pool.acquire(2 * PAGE)  # in the slot of the one that left
    heir.length = 11
    deltas = _deltas(4, 16, dtype)
    apply_batch(states, deltas.select([0, 2, 3]), RATES, kernels)
    for row in (0, 2, 3):
        apart[row].apply(deltas.row(row), RATES, kernels)
    assert _same_pools(pool, expected)
    assert heir.length == 11


@DTYPES
def test_states_of_their_own_and_of_several_pools(kernels: Kernels, dtype: torch.dtype) -> None:
    deltas = _deltas(3, 16, dtype)

    def states() -> list[ContextState]:
        pools = [StatePool(CONFIG, dtype, CPU, PoolSize(2, 4)) for _ in range(2)]
        mixed = [pools[0].acquire(PAGE), ContextState.alone(CONFIG, dtype, CPU), pools[1].acquire(PAGE)]
        for state in mixed:
            state.begin()
        return mixed

    together, apart = states(), states()
    apply_batch(together, deltas, RATES, kernels)
    for row, (state, other) in enumerate(zip(together, apart, strict=True)):
        other.apply(deltas.row(row), RATES, kernels)
        assert state.length == other.length == 16
        for i, mamba in state.mamba.items():
            assert torch.equal(mamba.ssm, other.mamba[i].ssm)
            assert torch.equal(mamba.conv, other.mamba[i].conv)
        for i, kv in state.kv.items():
            assert all(torch.equal(x, y) for x, y in zip(kv.slice(0, 16), other.kv[i].slice(0, 16), strict=True))


@pytest.mark.parametrize("others", [0, 1])
def test_more_tokens_than_were_reserved_change_nothing(others: int) -> None:
    """Not even where another session of the batch has more pages, so that its table is wider."""
    pool, before = _full_pool(torch.float32), _full_pool(torch.float32)
    states = [pool.acquire(PAGE), *(pool.acquire(3 * PAGE) for _ in range(others))]
    for state in states:
        state.length = PAGE - 15
    with pytest.raises(AssertionError, match="reserved"):
        apply_batch(states, _deltas(1 + others, 16, torch.float32), RATES)
    assert _same_pools(pool, before)
    apply_batch(states, _deltas(1 + others, 15, torch.float32), RATES)
    assert all(state.length == PAGE for state in states)


@DTYPES
def test_deltas_that_are_views_of_one_buffer(kernels: Kernels, dtype: torch.dtype) -> None:
    """As a worker reads them in shared memory; they are the context's, and nothing is written to them."""
    (pool, states), (expected, same) = _two(dtype, (PAGE - 1, PAGE, 0))
    deltas = _deltas(3, 16, dtype)
    buffer = torch.zeros(deltas.num_bytes + 64 * 100, dtype=torch.uint8)
    layers: dict[int, ScanFactors | KVDelta] = {}
    at = 0
    for i, change in deltas.layers.items():
        views = []
        for name in type(change).__slots__:
            tensor = getattr(change, name)
            view = buffer[at : at + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            views.append(view.copy_(tensor))
            at += -(-tensor.nbytes // 64) * 64
        layers[i] = type(change)(*views)
    kept = buffer.clone()
    apply_batch(states, DeltaBatch(16, layers), RATES, kernels)
    apply_batch(same, deltas, RATES, kernels)
    assert _same_pools(pool, expected)
    assert torch.equal(buffer, kept)


def _parts(change: ScanFactors | KVDelta | MambaDelta) -> list[Tensor]:
    names = ("k", "v") if isinstance(change, KVDelta) else ("x", "b", "dt", "conv")
    return [getattr(change, name) for name in names]


@DTYPES
@pytest.mark.parametrize("rows", [[2], [0, 1], [3, 0, 2], [3, 2, 1, 0], [1, 2, 3], []])
def test_select(dtype: torch.dtype, rows: list[int]) -> None:
    deltas = _deltas(4, 16, dtype)
    selected = deltas.select(rows)
    assert selected.length == 16
    assert selected.num_bytes == deltas.num_bytes // 4 * len(rows)
    assert selected.layers.keys() == deltas.layers.keys()
    for i, change in deltas.layers.items():
        assert type(selected.layers[i]) is type(change)
        for got, tensor in zip(_parts(selected.layers[i]), _parts(change), strict=True):
            assert torch.equal(got, tensor[rows] if rows else tensor[:0])
            assert not rows or got.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr()


def test_all_rows_in_their_order_are_not_copied() -> None:
    deltas = _deltas(4, 16, torch.float32)
    assert deltas.select([0, 1, 2, 3]) is deltas
    assert deltas.select(range(4)) is deltas
    assert DeltaBatch(16, {}).select([0]).layers == {}


def test_a_row_is_a_view_and_makes_a_batch_of_one() -> None:
    deltas = _deltas(3, 16, torch.bfloat16)
    row = deltas.row(1)
    assert isinstance(row, Delta)
    one = DeltaBatch.of(row)
    assert row.length == one.length == 16
    assert one.num_bytes == deltas.num_bytes // 3
    for i, change in deltas.layers.items():
        kind = KVDelta if isinstance(change, KVDelta) else MambaDelta
        assert type(row.layers[i]) is kind
        assert type(one.layers[i]) is type(change)
        for mine, batched, all_ in zip(_parts(row.layers[i]), _parts(one.layers[i]), _parts(change), strict=True):
            assert torch.equal(mine, all_[1])
            assert torch.equal(batched, all_[1:2])
            assert mine.data_ptr() == batched.data_ptr() == all_[1].data_ptr()


def test_what_a_batch_is() -> None:
    deltas = _deltas(2, 16, torch.float32)
    assert deltas.device == CPU
    assert deltas.num_bytes == sum(tensor.nbytes for change in deltas.layers.values() for tensor in _parts(change))
    assert (DeltaBatch(16, {}).device, DeltaBatch(16, {}).num_bytes) == (CPU, 0)
