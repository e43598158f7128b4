"""Properties of the towers that hold for any weights. The reference's numbers are in tests/conformance."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.support.checkpoints import write_tiny_checkpoint
from twotower.model.checkpoint import Checkpoint
from twotower.model.context_tower import ContextTower
from twotower.model.denoiser_tower import DenoiserTower
from twotower.model.state import ContextState
from twotower.model.weights import load_context_tower, load_denoiser_tower

CPU = torch.device("cpu")
Towers = tuple[ContextTower, DenoiserTower]


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> Towers:
    checkpoint = Checkpoint.open(write_tiny_checkpoint(tmp_path_factory.mktemp("tiny")))
    return load_context_tower(checkpoint, torch.float32, CPU), load_denoiser_tower(checkpoint, torch.float32, CPU)


def _tokens(count: int, seed: int = 0) -> Tensor:
    return torch.randint(4, 96, (count,), generator=torch.Generator().manual_seed(seed))


def _tensors(state: ContextState) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for i, mamba in state.mamba.items():
        out |= {f"{i}.conv": mamba.conv.clone(), f"{i}.ssm": mamba.ssm.clone()}
    for i, kv in state.kv.items():
        k, v = kv.slice(0, state.length)
        out |= {f"{i}.k": k.clone(), f"{i}.v": v.clone()}
    return out


def _close(a: ContextState, b: ContextState) -> None:
    assert a.length == b.length
    for name, tensor in _tensors(a).items():
        torch.testing.assert_close(tensor, _tensors(b)[name], rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("cut", [1, 3, 15, 16, 17, 40])
def test_a_prompt_in_pieces_gives_the_same_state(towers: Towers, cut: int) -> None:
    context, _ = towers
    tokens = _tokens(50)
    whole, pieces = context.new_state(), context.new_state()
    logits = context.prefill([tokens], [whole])[0]
    context.prefill([tokens[:cut]], [pieces], need_logits=False)
    torch.testing.assert_close(context.prefill([tokens[cut:]], [pieces])[0], logits, rtol=1e-3, atol=1e-3)
    _close(whole, pieces)


def test_commit_and_prefill_agree(towers: Towers) -> None:
    context, _ = towers
    tokens = _tokens(53)
    whole, committed = context.new_state(), context.new_state()
    context.prefill([tokens], [whole])
    context.prefill([tokens[:37]], [committed])
    context.commit(tokens[37:].unsqueeze(0), [committed])
    _close(whole, committed)


def test_token_by_token_gives_the_same_logits(towers: Towers) -> None:
    context, _ = towers
    tokens = _tokens(12)
    whole, single = context.new_state(), context.new_state()
    expected = context.prefill([tokens], [whole])[0]
    logits = None
    for token in tokens:
        _, logits = context.commit(token.view(1, 1), [single], need_logits=True)
    assert logits is not None
    torch.testing.assert_close(logits[0], expected, rtol=1e-3, atol=1e-3)
    _close(whole, single)


def test_a_batch_of_commits_gives_the_bits_of_each_alone(towers: Towers) -> None:
    """S must not depend on who else is committed: a worker applies the delta alone."""
    context, _ = towers
    prompts = [_tokens(n, n) for n in (1, 9, 30)]
    blocks = torch.stack([_tokens(16, 100 + n) for n in range(3)])
    batch = [context.new_state() for _ in prompts]
    for prompt, state in zip(prompts, batch, strict=True):
        context.prefill([prompt], [state])
    rates = context.decay_rates()
    followers = []
    for state in batch:  # a worker's copies, from before the commit
        copy = ContextState.alone(context.config, context.dtype, CPU)
        for i, mamba in state.mamba.items():
            copy.mamba[i].conv.copy_(mamba.conv)
            copy.mamba[i].ssm.copy_(mamba.ssm)
        for i, kv in state.kv.items():
            copy.kv[i].write(0, *kv.slice(0, state.length))
        copy.length = state.length
        followers.append(copy)
    deltas, _ = context.commit(blocks, batch)
    for delta, leader, follower in zip(deltas, batch, followers, strict=True):
        follower.apply(delta, rates)
        theirs = _tensors(leader)
        assert follower.length == leader.length
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in _tensors(follower).items())


def test_denoising_leaves_the_state_alone(towers: Towers) -> None:
    context, denoiser = towers
    state = context.new_state()
    context.prefill([_tokens(20)], [state])
    before = _tensors(state)
    denoiser.denoise(torch.full((1, 16), 3), torch.ones(1), [state])
    after = _tensors(state)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_rows_of_a_batch_are_independent(towers: Towers) -> None:
    context, denoiser = towers
    states, blocks = [], []
    for n in (0, 1, 17, 300):
        state = context.new_state()
        if n:
            context.prefill([_tokens(n, n)], [state])
        states.append(state)
        block = torch.full((16,), 3)
        block[: n % 7] = _tokens(n % 7, n)
        blocks.append(block)
    t = torch.tensor([1.0, 0.5, 0.25, 0.0625])
    together = denoiser.denoise(torch.stack(blocks), t, states)
    for i, state in enumerate(states):
        alone = denoiser.denoise(blocks[i].unsqueeze(0), t[i : i + 1], [state])
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-4)


def test_the_block_is_seen_in_both_directions_and_t_matters(towers: Towers) -> None:
    context, denoiser = towers
    state = context.new_state()
    context.prefill([_tokens(5)], [state])
    block = torch.full((1, 16), 3)
    base = denoiser.denoise(block, torch.tensor([0.9]), [state])
    changed = block.clone()
    changed[0, 15] = 50
    assert (denoiser.denoise(changed, torch.tensor([0.9]), [state])[0, 0] - base[0, 0]).abs().max() > 1e-4
    assert (denoiser.denoise(block, torch.tensor([0.1]), [state]) - base).abs().max() > 1e-4


def test_the_seed_matters(towers: Towers) -> None:
    """Without the Mamba seed a denoiser is blind to most of its context."""
    context, denoiser = towers
    states = [context.new_state() for _ in range(2)]
    for seed, state in enumerate(states):
        context.prefill([_tokens(20, seed)], [state])
    logits = denoiser.denoise(torch.full((2, 16), 3), torch.ones(2), states)
    assert (logits[0] - logits[1]).abs().max() > 1e-2


def test_bf16_stays_near_fp32(tmp_path: Path, towers: Towers) -> None:
    context, denoiser = towers
    checkpoint = Checkpoint.open(write_tiny_checkpoint(tmp_path))
    half = load_context_tower(checkpoint, torch.bfloat16, CPU), load_denoiser_tower(checkpoint, torch.bfloat16, CPU)
    states = [context.new_state(), half[0].new_state()]
    logits = [t.prefill([_tokens(40)], [s])[0] for t, s in zip((context, half[0]), states, strict=True)]
    assert logits[0] is not None
    assert logits[1] is not None
    scale = logits[0].std()
    assert (logits[0] - logits[1]).abs().mean() < 0.1 * scale
    assert states[1].mamba[0].ssm.dtype is torch.float32
    assert states[1].mamba[0].conv.dtype is torch.bfloat16
    masks = torch.full((1, 16), 3)
    a, b = denoiser.denoise(masks, torch.ones(1), states[:1]), half[1].denoise(masks, torch.ones(1), states[1:])
    assert (a - b).abs().mean() < 0.1 * a.std()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, on the import of its compiler
@pytest.mark.skipif(shutil.which("g++") is None, reason="graphs are compiled with g++")
def test_compiled_graphs_compute_the_same(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(write_tiny_checkpoint(tmp_path, hybrid_override_pattern="ME*", num_hidden_layers=3))
    context = load_context_tower(checkpoint, torch.float32, CPU)
    denoiser = load_denoiser_tower(checkpoint, torch.float32, CPU)
    results = []
    for compiled in (False, True):
        context.compiled = denoiser.compiled = compiled
        state, logits = context.new_state(), []
        context.prefill([_tokens(21)], [state])
        for i in range(2):  # the second time with a longer context: nothing is compiled anew
            logits.append(denoiser.denoise(_tokens(8, i).unsqueeze(0), torch.tensor([0.5]), [state]))
            context.commit(_tokens(8, i).unsqueeze(0), [state])
            _, last = context.commit(_tokens(1, i).unsqueeze(0), [state], need_logits=True)
            assert last is not None
            logits.append(last)
        results.append((logits, _tensors(state)))
    (plain, plain_state), (fused, fused_state) = results
    for expected, got in zip(plain, fused, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    for name, expected in plain_state.items():
        torch.testing.assert_close(fused_state[name], expected, rtol=1e-4, atol=1e-4)
