"""The training forwards compute what the serving forwards compute."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from twotower.model.config import ModelConfig
from twotower.model.context_tower import ContextTower
from twotower.model.denoiser_tower import DenoiserTower
from twotower.train import forward
from twotower.train.forward import Usage, _experts, _wide_experts, block_logits, block_seeds, context_logits
from twotower.train.start import new_context_tower, new_denoiser_tower

BLOCK = 16


def towers(config: ModelConfig) -> tuple[ContextTower, DenoiserTower]:
    context = new_context_tower(config, seed=3)
    denoiser = new_denoiser_tower(context)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in denoiser.parameters():  # away from the identity, so that the time conditioning counts
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    return context, denoiser


def test_context_logits_equal_serving(config: ModelConfig) -> None:
    context, _ = towers(config)
    tokens = torch.randint(0, config.vocab_size, (2, 37), generator=torch.Generator().manual_seed(0))
    trained = context_logits(context, tokens)
    for row in range(2):
        state = context.new_state()
        for i in range(37):
            logits = context.prefill([tokens[row, i : i + 1]], [state])[0]
            assert logits is not None
            torch.testing.assert_close(trained[row, i], logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("prompt", [1, 2, 5, 21])
def test_block_logits_equal_serving(config: ModelConfig, prompt: int) -> None:
    context, denoiser = towers(config)
    generator = torch.Generator().manual_seed(prompt)
    tokens = torch.randint(0, config.vocab_size, (2, prompt + 3 * BLOCK), generator=generator)
    noisy = torch.randint(0, config.vocab_size, (2, 3, BLOCK), generator=generator)
    t = torch.rand(2, 3, generator=generator)
    trained = block_logits(denoiser, noisy, t, block_seeds(context, tokens, prompt, BLOCK))
    for row in range(2):
        state = context.new_state()
        context.prefill([tokens[row, :prompt]], [state])
        for block in range(3):
            served = denoiser.denoise(noisy[row, block : block + 1], t[row, block : block + 1], [state])
            torch.testing.assert_close(trained[row, block], served[0], atol=1e-4, rtol=0)
            start = prompt + block * BLOCK
            context.commit(tokens[row : row + 1, start : start + BLOCK], [state])


@pytest.mark.parametrize("block", [4, 8, 32])
def test_prompts_of_different_lengths_in_one_batch(config: ModelConfig, block: int) -> None:
    context, denoiser = towers(config)
    generator = torch.Generator().manual_seed(block)
    lengths, prompt = [21, 1, 14], 21
    tokens = torch.randint(0, config.vocab_size, (3, prompt + 2 * block), generator=generator)
    starts = torch.tensor([prompt - length for length in lengths])
    noisy = torch.randint(0, config.vocab_size, (3, 2, block), generator=generator)
    t = torch.rand(3, 2, generator=generator)
    together = block_logits(denoiser, noisy, t, block_seeds(context, tokens, prompt, block, starts))
    for row, length in enumerate(lengths):
        alone = tokens[row : row + 1, prompt - length :]
        seeds = block_seeds(context, alone, length, block)
        torch.testing.assert_close(together[row], block_logits(denoiser, noisy[row : row + 1], t[row : row + 1], seeds)[0])


def test_all_experts_at_once_equal_each_on_its_own(config: ModelConfig) -> None:
    generator = torch.Generator().manual_seed(0)
    h, up = torch.randn(9, 32, generator=generator), torch.randn(4, 16, 32, generator=generator)
    down, weights = torch.randn(4, 32, 16, generator=generator), torch.rand(9, 2, generator=generator)
    experts = torch.stack([torch.randperm(4, generator=generator)[:2] for _ in range(9)])
    torch.testing.assert_close(_wide_experts(h, experts, weights, up, down), _experts(h, experts, weights, up, down))


def test_fresh_denoiser_ignores_time_and_equals_its_context_tower(config: ModelConfig) -> None:
    context = new_context_tower(config, seed=3)
    denoiser = new_denoiser_tower(context)
    tokens = torch.randint(4, config.vocab_size, (1, 5 + BLOCK), generator=torch.Generator().manual_seed(0))
    state = context.new_state()
    context.prefill([tokens[0, :5]], [state])
    last = tokens[:, 5:6]
    timed = [denoiser.denoise(last, torch.tensor([t]), [state]) for t in (0.1, 1.0)]
    torch.testing.assert_close(timed[0], timed[1])
    # One position has nothing behind it: there the denoiser, untrained, predicts what the context tower predicts.
    torch.testing.assert_close(timed[0][0, 0], context.prefill([tokens[0, 5:6]], [state])[0], atol=1e-4, rtol=0)


def test_usage_counts_every_choice(config: ModelConfig) -> None:
    usage = Usage()
    context_logits(new_context_tower(config, seed=0), torch.arange(20).view(2, 10), usage)
    assert {i: int(c.sum()) for i, c in usage.counts.items()} == {2: 20 * config.num_experts_per_tok}


@pytest.mark.parametrize("bf16", [False, True])
def test_the_forms_for_a_gpu_compute_the_same(config: ModelConfig, monkeypatch: pytest.MonkeyPatch, bf16: bool) -> None:
    context, denoiser = towers(config)
    generator = torch.Generator().manual_seed(0)
    tokens, starts = torch.randint(0, config.vocab_size, (3, 9 + 16), generator=generator), torch.tensor([0, 8, 3])
    noisy, t = torch.randint(0, config.vocab_size, (3, 2, 8), generator=generator), torch.rand(3, 2, generator=generator)

    def both() -> tuple[Tensor, Tensor, list[Tensor]]:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logits = context_logits(context, tokens)
            blocks = block_logits(denoiser, noisy, t, block_seeds(context, tokens, 9, 8, starts))
        trained = [p for tower in (context, denoiser) for p in tower.parameters() if p.requires_grad]
        return logits, blocks, list(torch.autograd.grad(logits.square().mean() + blocks.square().mean(), trained))

    here = both()
    monkeypatch.setattr(forward, "_on_cpu", lambda _: False)
    there = both()
    for a, b in zip((*here[:2], *here[2]), (*there[:2], *there[2]), strict=True):
        if bf16:  # another rounding may choose another expert
            assert (a - b).norm() < 0.3 * a.norm() + 1e-3
        else:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
