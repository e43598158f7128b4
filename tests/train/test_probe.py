"""What is measured without generating is what generation gives."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import pytest
import torch

from twotower.engine.local import Generation, LocalEngine
from twotower.model.config import ModelConfig
from twotower.model.weights import export_tensors, save_checkpoint
from twotower.request import GenerationParams, Mode
from twotower.train.batches import BlockBatch, block_batches
from twotower.train.calibrate import apply_scale, choose
from twotower.train.corpus import Example
from twotower.train.probe import Probe, probe_context, probe_denoiser
from twotower.train.start import new_context_tower, new_denoiser_tower

from .conftest import TINY

PROMPTS = [[5, 6, 7, 8], [9, 10], [11, 12, 13, 14, 15, 16]]
BLOCK, TOKENS = 8, 16


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    context = new_context_tower(ModelConfig.from_dict(TINY), 0)
    denoiser = new_denoiser_tower(context)
    with torch.no_grad():
        denoiser.lm_head.weight.mul_(4)  # sure enough of some tokens to write several at a time
    path = tmp_path_factory.mktemp("tiny")
    save_checkpoint(path, TINY, {**export_tensors(context, torch.float32), **export_tensors(denoiser, torch.float32)})
    return path


def write(engine: LocalEngine, prompt: list[int], mode: Mode) -> Generation:
    return engine.generate(prompt, GenerationParams(max_tokens=TOKENS, mode=mode, block_size=BLOCK, steps=BLOCK, gamma=0.1))


def as_batches(prompt: list[int], tokens: list[int]) -> list[BlockBatch]:
    return block_batches([Example(tuple(prompt), tuple(tokens))], 1, {BLOCK: 1.0}, random.Random(0))


@pytest.mark.parametrize("prompt", PROMPTS)
def test_ar_is_exact_for_what_it_wrote_and_for_nothing_else(checkpoint: Path, prompt: list[int]) -> None:
    engine = LocalEngine(checkpoint, dtype="float32", kernels="torch", threads=1)
    tokens = write(engine, prompt, Mode.AR).token_ids
    tower, end = engine.context.tower, tokens[-1]
    assert probe_context(tower, as_batches(prompt, tokens), eos=end, bf16=False) == Probe(1.0, 1.0)
    tokens[0] = next(token for token in range(5, 20) if token not in (tokens[0], end))
    assert probe_context(tower, as_batches(prompt, tokens), eos=end, bf16=False).exact == 0.0


@pytest.mark.parametrize("prompt", PROMPTS)
def test_diffusion_is_exact_for_what_it_wrote_and_counts_its_forwards(checkpoint: Path, prompt: list[int]) -> None:
    engine = LocalEngine(checkpoint, dtype="float32", kernels="torch", threads=1)
    done = write(engine, prompt, Mode.DIFFUSION)
    tokens, tower = done.token_ids, engine.denoiser.tower
    end = tokens[-1]
    tower.config = dataclasses.replace(tower.config, eos_token_id=end)
    probe = probe_denoiser(tower, engine.context.tower, as_batches(prompt, tokens), gamma=0.1, bf16=False)
    assert probe == Probe(1.0, (tokens.index(end) + 1) / done.forwards)
    tokens[0] = next(token for token in range(5, 20) if token not in (tokens[0], end))
    assert probe_denoiser(tower, engine.context.tower, as_batches(prompt, tokens), gamma=0.1, bf16=False).exact == 0.0


def test_the_greatest_scale_within_the_tolerance_of_the_best_is_chosen() -> None:
    assert choose({1.0: 0.90, 0.8: 0.948, 0.7: 0.95, 0.5: 0.949}) == 0.8
    assert choose({1.0: 0.2, 0.5: 0.2}) == 1.0


def test_a_scale_changes_the_denoiser_s_head_alone(checkpoint: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    (checkpoint / "tokenizer.json").write_text("{}")
    apply_scale(checkpoint, tmp_path / "out", 0.5)
    before, after = (load_file(path / "model.safetensors") for path in (checkpoint, tmp_path / "out"))
    assert [name for name in before if not torch.equal(before[name], after[name])] == ["lm_head.weight"]
    assert torch.equal(before["lm_head.weight"] * 0.5, after["lm_head.weight"])
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
