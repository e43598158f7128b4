from __future__ import annotations

import random

import pytest
import torch

from tests.support.checkpoints import write_tiny_checkpoint
from twotower.errors import ConfigError, Overloaded
from twotower.model.checkpoint import Checkpoint
from twotower.model.context_tower import ContextTower
from twotower.model.delta_batch import apply_batch
from twotower.model.denoiser_tower import DenoiserTower
from twotower.model.pool import PAGE, PoolSize, StatePool, page_bytes, slot_bytes
from twotower.model.rows import StateRows
from twotower.model.state import ContextState
from twotower.model.weights import load_context_tower, load_denoiser_tower
from twotower_kernels.kernels import TORCH

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> tuple[ContextTower, DenoiserTower]:
    checkpoint = Checkpoint.open(write_tiny_checkpoint(tmp_path_factory.mktemp("tiny")))
    return load_context_tower(checkpoint, torch.float32, CPU), load_denoiser_tower(checkpoint, torch.float32, CPU)


def _pool(tower: ContextTower, slots: int, pages: int) -> StatePool:
    return StatePool(tower.config, tower.dtype, CPU, PoolSize(slots, pages))


def _tokens(n: int, seed: int) -> torch.Tensor:
    return torch.randint(5, 60, (n,), generator=torch.Generator().manual_seed(seed))


def _same(a: ContextState, b: ContextState) -> bool:
    mamba = all(torch.equal(a.mamba[i].ssm, b.mamba[i].ssm) and torch.equal(a.mamba[i].conv, b.mamba[i].conv) for i in a.mamba)
    pairs = ((x, y) for i in a.kv for x, y in zip(a.kv[i].slice(0, a.length), b.kv[i].slice(0, b.length), strict=True))
    return a.length == b.length and mamba and all(torch.equal(x, y) for x, y in pairs)


def test_sizes_follow_the_budget(towers: tuple[ContextTower, DenoiserTower]) -> None:
    tower = towers[0]
    slot, page = slot_bytes(tower.config, tower.dtype), page_bytes(tower.config, tower.dtype)

    def within(budget: int, max_slots: int = 8, max_tokens: int = 4 * PAGE) -> PoolSize:
        return PoolSize.within(tower.config, tower.dtype, budget, max_slots=max_slots, max_tokens=max_tokens)

    assert within(10**12) == PoolSize(8, 32)
    assert within(slot + page) == PoolSize(1, 1)
    assert within(3 * (slot + page) + page) == PoolSize(3, 4)
    with pytest.raises(ConfigError, match="state_memory"):
        within(slot + page - 1)


def test_what_does_not_fit_is_refused_and_fits_again_after_a_release(towers: tuple[ContextTower, DenoiserTower]) -> None:
    pool = _pool(towers[0], 2, 5)
    first, second = pool.acquire(2 * PAGE), pool.acquire(1)
    assert (pool.used_slots, pool.used_pages) == (2, 3)
    with pytest.raises(Overloaded, match="0 of 2 slots"):
        pool.acquire(1)
    pool.release(first)
    with pytest.raises(Overloaded, match="4 of 5 pages"):
        pool.acquire(4 * PAGE + 1)
    assert not pool.ever_fits(5 * PAGE + 1)
    third = pool.acquire(4 * PAGE)
    pool.release(second)
    pool.release(third)
    assert (pool.used_slots, pool.used_pages) == (0, 0)


def test_a_slot_starts_empty_whoever_had_it_before(towers: tuple[ContextTower, DenoiserTower]) -> None:
    tower = towers[0]
    pool, alone = _pool(tower, 1, 2), tower.new_state()
    before = pool.acquire(2 * PAGE)
    tower.prefill([_tokens(100, 0)], [before])
    pool.release(before)
    again = pool.acquire(2 * PAGE)
    tower.prefill([_tokens(30, 1)], [again])
    tower.prefill([_tokens(30, 1)], [alone])
    assert _same(again, alone)


def test_no_more_tokens_than_were_reserved(towers: tuple[ContextTower, DenoiserTower]) -> None:
    state = _pool(towers[0], 1, 2).acquire(PAGE)
    with pytest.raises(AssertionError, match="reserved"):
        towers[0].prefill([_tokens(PAGE + 1, 0)], [state])


def test_sessions_that_come_and_go_have_the_bits_of_sessions_alone(towers: tuple[ContextTower, DenoiserTower]) -> None:
    """Slots and pages in any order, pages that do not follow one another, batches of any rows."""
    context, denoiser = towers
    pool, rng = _pool(context, 5, 14), random.Random(0)
    live: list[tuple[ContextState, ContextState, int]] = []
    scattered = copied = False
    for round_ in range(60):
        if live and (len(live) == 5 or rng.random() < 0.35):
            state, _, _ = live.pop(rng.randrange(len(live)))
            pool.release(state)
        room = rng.choice((PAGE // 2, 2 * PAGE, 3 * PAGE))
        if pool.fits(room):
            state, alone = pool.acquire(room), context.new_state()
            prompt = _tokens(rng.randrange(1, room - 20), round_)
            context.prefill([prompt], [state])
            context.prefill([prompt], [alone])
            live.append((state, alone, room))
        batch = [one for one in rng.sample(live, len(live)) if one[0].length + 8 <= one[2]]
        if not batch:
            continue
        blocks = torch.stack([_tokens(8, 1000 + round_ + i) for i in range(len(batch))])
        pooled, apart = [one[0] for one in batch], [one[1] for one in batch]
        rows = StateRows(pooled, TORCH)
        scattered |= any(state.place is not None and list(state.place.pages) != _run(state.place.pages) for state in pooled)
        copied |= rows.seed(0)[2] is not None
        t = torch.full((len(batch),), 0.5)
        assert torch.equal(denoiser.denoise(blocks, t, pooled), denoiser.denoise(blocks, t, apart))
        context.commit(blocks, pooled)
        context.commit(blocks, apart)
        assert all(_same(state, alone) for state, alone, _ in live)
    assert scattered
    assert copied


def _run(pages: tuple[int, ...]) -> list[int]:
    return list(range(pages[0], pages[0] + len(pages)))


def test_neighbours_are_read_and_written_without_a_copy(towers: tuple[ContextTower, DenoiserTower]) -> None:
    context = towers[0]
    pool = _pool(context, 4, 4)
    states = [pool.acquire(PAGE) for _ in range(3)]
    rows = StateRows(states[1:], TORCH)
    conv, ssm, slots = rows.seed(0)
    assert slots is None
    assert ssm.data_ptr() == pool.ssm[0][1].data_ptr()
    assert conv.data_ptr() == pool.conv[0][1].data_ptr()


def test_deltas_applied_together_have_the_bits_of_deltas_applied_one_by_one(
    towers: tuple[ContextTower, DenoiserTower],
) -> None:
    context = towers[0]
    pool, rates = _pool(context, 6, 12), context.decay_rates()
    held = [pool.acquire(2 * PAGE) for _ in range(6)]
    pool.release(held.pop(2))  # the others are no neighbours
    alone = [context.new_state() for _ in held]
    for i, (state, other) in enumerate(zip(held, alone, strict=True)):
        context.prefill([_tokens(10 + i, i)], [state])
        context.prefill([_tokens(10 + i, i)], [other])
    origin = [context.new_state() for _ in held]
    for i, state in enumerate(origin):
        context.prefill([_tokens(10 + i, i)], [state])
    blocks = torch.stack([_tokens(8, 50 + i) for i in range(len(held))])
    deltas = context.accept_all(origin, context.verify(blocks, origin, need_logits=False))
    apply_batch(held, deltas, rates)
    for row, state in enumerate(alone):
        state.apply(deltas.row(row), rates)
    assert all(_same(a, b) and _same(a, c) for a, b, c in zip(held, alone, origin, strict=True))
