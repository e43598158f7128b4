"""Whole towers by Triton kernels against plain torch: in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.support.checkpoints import write_tiny_checkpoint
from twotower.engine.batch import generate_batch
from twotower.engine.context_engine import ContextEngine
from twotower.engine.denoiser_engine import DenoiserEngine
from twotower.model.checkpoint import Checkpoint
from twotower.model.context_tower import ContextTower
from twotower.model.denoiser_tower import DenoiserTower
from twotower.model.pool import PAGE, PoolSize, StatePool
from twotower.model.rows import PagedRows, StateRows, rows_of
from twotower.model.state import ContextState
from twotower.model.weights import load_context_tower, load_denoiser_tower
from twotower.request import GenerationParams, Mode

pytest.importorskip("triton")

from twotower_kernels.triton.common import interpreted

pytestmark = pytest.mark.device

DEVICE = torch.device("cpu" if interpreted() else "cuda")
LENGTHS = (70, 3, 130)
"""Of the contexts: two pages, one, three."""
TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 6e-2}

Towers = dict[str, tuple[ContextTower, DenoiserTower]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(write_tiny_checkpoint(tmp_path_factory.mktemp("tiny")))


def _towers(checkpoint: Checkpoint, dtype: torch.dtype) -> Towers:
    return {
        name: (
            load_context_tower(checkpoint, dtype, DEVICE, kernels=name),
            load_denoiser_tower(checkpoint, dtype, DEVICE, kernels=name),
        )
        for name in ("torch", "triton")
    }


def _tokens(count: int, seed: int) -> Tensor:
    return torch.randint(4, 96, (count,), generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def _pool(tower: ContextTower) -> StatePool:
    pool = StatePool(tower.config, tower.dtype, tower.device, PoolSize(5, 12))
    for tensor in (*pool.kv.values(), *pool.ssm.values(), *pool.conv.values()):
        tensor.fill_(float("nan"))  # nothing may be read that was not written
    return pool


def _states(tower: ContextTower) -> list[ContextState]:
    """Sessions in slots and pages that are no neighbours and in no order."""
    pool = _pool(tower)
    first, gap = pool.acquire(PAGE), pool.acquire(PAGE)
    states = [pool.acquire(LENGTHS[0] + 32), gap]
    pool.release(first)
    states.append(pool.acquire(LENGTHS[2] + 32))
    for i, (state, length) in enumerate(zip(states, LENGTHS, strict=True)):
        tower.prefill([_tokens(length, i)], [state], need_logits=False)
    return [states[2], states[0], states[1]]


def _close(got: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert got.isfinite().all()
    error = (got.double() - expected.double()).abs().max() / expected.double().abs().max()
    assert error <= TOLERANCE[dtype]


def _tensors(state: ContextState) -> list[Tensor]:
    mamba = [tensor for layer in state.mamba.values() for tensor in (layer.conv, layer.ssm)]
    return [*mamba, *(tensor for layer in state.kv.values() for tensor in layer.slice(0, state.length))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_towers_agree_over_a_pool(checkpoint: Checkpoint, dtype: torch.dtype) -> None:
    towers = _towers(checkpoint, dtype)
    seen = {}
    for name, (context, denoiser) in towers.items():
        states = _states(towers["torch"][0])  # equal seeds: what is compared is one forward each
        assert isinstance(rows_of(states, context.kernels), PagedRows if name == "triton" else StateRows)
        blocks = torch.stack([_tokens(16, 10 + i) for i in range(3)])
        t = torch.tensor([1.0, 0.5, 0.0625], device=DEVICE)
        before = [tensor.clone() for state in states for tensor in _tensors(state)]
        logits = denoiser.denoise(blocks, t, states)
        assert all(map(torch.equal, before, (tensor for state in states for tensor in _tensors(state))))
        deltas, last = context.commit(blocks, states, need_logits=True)
        assert last is not None
        _, token = context.commit(blocks[:, :1], states, need_logits=True)
        assert token is not None
        factors = [
            v for delta in deltas for change in delta.layers.values() for v in (getattr(change, f) for f in change.__slots__)
        ]
        seen[name] = [logits, last, token, *factors, *(tensor for state in states for tensor in _tensors(state))]
    for got, expected in zip(seen["triton"], seen["torch"], strict=True):
        _close(got, expected, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prompts_read_together_agree(checkpoint: Checkpoint, dtype: torch.dtype) -> None:
    seen = {}
    towers = _towers(checkpoint, dtype)
    for name, (context, _) in towers.items():
        states = _states(towers["torch"][0])
        logits = context.prefill([_tokens(count, 40 + i) for i, count in enumerate((9, 20, 1))], states)
        seen[name] = [*logits, *(tensor for state in states for tensor in _tensors(state))]
    for got, expected in zip(seen["triton"], seen["torch"], strict=True):
        assert got is not None
        assert expected is not None
        _close(got, expected, dtype)


def test_a_follower_has_the_bits_of_the_context(checkpoint: Checkpoint) -> None:
    """Whichever of the two forms applies the delta."""
    towers = _towers(checkpoint, torch.bfloat16)
    context = towers["triton"][0]
    states = _states(context)
    blocks = torch.stack([_tokens(16, 20 + i) for i in range(3)])
    copies: dict[str, list[ContextState]] = {}
    for name in towers:
        copies[name] = []
        for state in states:
            copy = context.new_state()
            copy.length = state.length
            for i, layer in state.mamba.items():
                copy.mamba[i].conv.copy_(layer.conv)
                copy.mamba[i].ssm.copy_(layer.ssm)
            for i, kv in state.kv.items():
                copy.kv[i].write(0, *kv.slice(0, state.length))
            copies[name].append(copy)
    deltas, _ = context.commit(blocks, states)
    rates = context.decay_rates()
    for name, followers in copies.items():
        for state, delta, follower in zip(states, deltas, followers, strict=True):
            follower.apply(delta, rates, towers[name][0].kernels)
            assert all(map(torch.equal, _tensors(follower), _tensors(state))), name


@pytest.mark.parametrize("mode", [Mode.DIFFUSION, Mode.AR])
def test_generations_are_the_same(checkpoint: Checkpoint, mode: Mode) -> None:
    prompts = [_tokens(length, i).tolist() for i, length in enumerate((5, 70, 9))]
    count = 20 if mode is Mode.DIFFUSION else 4
    params = GenerationParams(mode=mode, max_tokens=count, steps=2, gamma=0.3, temperature=0.7, seed=3)
    results = {}
    for name, (context, denoiser) in _towers(checkpoint, torch.float32).items():
        done = generate_batch(ContextEngine(context, graphs=False), DenoiserEngine(denoiser, graphs=False), prompts, params, 2)
        results[name] = {one.index: one.token_ids for one in done}
    assert results["triton"] == results["torch"]


def test_one_session_alone(checkpoint: Checkpoint) -> None:
    """A state of its own, in no pool, has no pages: attention goes by the library then."""
    logits = {}
    for name, (context, denoiser) in _towers(checkpoint, torch.float32).items():
        state = context.new_state()
        context.prefill([_tokens(20, 0)], [state])
        logits[name] = denoiser.denoise(_tokens(16, 1).unsqueeze(0), torch.tensor([0.5], device=DEVICE), [state])
    _close(logits["triton"], logits["torch"], torch.float32)
