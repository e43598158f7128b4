"""Both trainers on a tiny model: the loss falls, the context stays, an interrupted run continues."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor

from twotower.errors import ConfigError, LossNotFinite
from twotower.model.config import ModelConfig
from twotower.train.context import ContextPools, ContextTask
from twotower.train.corpus import Text
from twotower.train.denoiser import BlockPools, DenoiserTask, Masking, draw_counts, weights_hash
from twotower.train.forward import Usage
from twotower.train.loop import METRICS_FILE, STATE_FILE, Loop, LoopConfig
from twotower.train.optim import orthogonalize
from twotower.train.plot import plot_loss
from twotower.train.start import new_context_tower, new_denoiser_tower

TEXTS = [Text(f"Tom has {i} apples.", f"\nThe answer is {i + 1}.") for i in range(8)]


def source(number: int) -> list[Text]:
    return TEXTS


def context_task(config: ModelConfig, tokenizer: Tokenizer) -> ContextTask:
    return ContextTask(new_context_tower(config, 0), ContextPools(source, tokenizer, 4, 0.1), bf16=False)


def denoiser_task(config: ModelConfig, tokenizer: Tokenizer) -> DenoiserTask:
    context = new_context_tower(config, 0)
    pools = BlockPools(source, tokenizer, 4, {8: 0.5, 16: 0.5})
    return DenoiserTask(new_denoiser_tower(context), context, pools, masking=Masking(0.2, 0.5, 0.5), bf16=False)


Make = Callable[[ModelConfig, Tokenizer], ContextTask | DenoiserTask]


def losses(run_dir: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run_dir / METRICS_FILE).read_text().splitlines()]


@pytest.mark.parametrize("make", [context_task, denoiser_task])
def test_overfits_a_few_texts(make: Make, config: ModelConfig, tokenizer: Tokenizer, tmp_path: Path) -> None:
    Loop(make(config, tokenizer), LoopConfig(steps=40, log_every=10), tmp_path).run()
    curve = losses(tmp_path)
    assert curve[-1] < 0.5 * curve[0]


@pytest.mark.parametrize("make", [context_task, denoiser_task])
def test_interrupted_run_continues_to_the_same_weights(
    make: Make, config: ModelConfig, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    settings = LoopConfig(steps=12, log_every=3)
    whole = Loop(make(config, tokenizer), settings, tmp_path / "whole")
    whole.run()
    Loop(make(config, tokenizer), settings, tmp_path / "cut").run(stop_at=6)
    rest = Loop(make(config, tokenizer), settings, tmp_path / "cut")
    assert rest.progress.step == 6
    rest.run()
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    for name, value in whole.ema.items():
        assert torch.equal(rest.ema[name], value), name


def test_a_run_that_was_killed_after_its_last_save_logs_no_step_twice(
    config: ModelConfig, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    settings = LoopConfig(steps=8, log_every=1)
    Loop(context_task(config, tokenizer), settings, tmp_path).run(stop_at=4)
    row = json.loads((tmp_path / METRICS_FILE).read_text().splitlines()[-1])
    with (tmp_path / METRICS_FILE).open("a") as file:
        file.write(json.dumps({**row, "step": 5}) + "\n" + json.dumps(row)[:20])  # the last line was being written
    Loop(context_task(config, tokenizer), settings, tmp_path).run()
    rows = [json.loads(line) for line in (tmp_path / METRICS_FILE).read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 9))


def test_the_run_of_another_model_is_not_continued(config: ModelConfig, tokenizer: Tokenizer, tmp_path: Path) -> None:
    Loop(context_task(config, tokenizer), LoopConfig(steps=2), tmp_path).run()
    saved = (tmp_path / STATE_FILE).read_bytes()
    other = dataclasses.replace(config, vocab_size=config.vocab_size + 8)
    with pytest.raises(ConfigError, match=r"run_dir: .* another model, which differs in 2 tensors"):
        Loop(context_task(other, tokenizer), LoopConfig(steps=2), tmp_path)
    assert (tmp_path / STATE_FILE).read_bytes() == saved


def test_the_curve_is_drawn(tmp_path: Path) -> None:
    out = tmp_path / "loss.png"
    plot_loss(tmp_path / METRICS_FILE, out)
    assert not out.exists()  # nothing was logged
    rows = [{"step": i, "tokens": 100 * i, "seconds": 2.0 * i, "loss": 1 / i} for i in range(1, 30)]
    (tmp_path / METRICS_FILE).write_text("".join(json.dumps(row) + "\n" for row in rows))
    plot_loss(tmp_path / METRICS_FILE, out)
    assert out.read_bytes().startswith(b"\x89PNG")


def test_denoiser_training_leaves_the_context_as_it_is(config: ModelConfig, tokenizer: Tokenizer, tmp_path: Path) -> None:
    task = denoiser_task(config, tokenizer)
    before, denoiser = weights_hash(task.context), task.model.lm_head.weight.clone()
    Loop(task, LoopConfig(steps=3), tmp_path).run()
    assert weights_hash(task.context) == before
    assert all(p.grad is None for p in task.context.parameters())
    assert not torch.equal(task.model.lm_head.weight, denoiser)


def test_loss_that_is_not_finite_stops_and_keeps_the_last_state(
    config: ModelConfig, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    task = context_task(config, tokenizer)
    Loop(task, LoopConfig(steps=9), tmp_path).run(stop_at=2)
    saved = (tmp_path / STATE_FILE).read_bytes()

    class Broken(ContextTask):
        def loss(self, batch: object, generator: torch.Generator, usage: Usage) -> tuple[Tensor, int]:
            return torch.tensor(torch.nan), 1

    task.__class__ = Broken
    with pytest.raises(LossNotFinite, match="step 2"):
        Loop(task, LoopConfig(steps=9), tmp_path).run()
    assert (tmp_path / STATE_FILE).read_bytes() == saved


def test_masked_shares_cover_low_and_high_evenly() -> None:
    counts = draw_counts(torch.Size((8, 20)), 16, 0.0, torch.Generator().manual_seed(0))
    assert counts.flatten().bincount(minlength=17).tolist() == [0] + [10] * 16
    counts = draw_counts(torch.Size((8, 40)), 16, 0.5, torch.Generator().manual_seed(0))
    assert counts.flatten().bincount(minlength=17).tolist() == [0] + [10] * 15 + [170]
    assert (draw_counts(torch.Size((8, 40)), 16, 1.0, torch.Generator()) == 16).all()


@pytest.mark.parametrize("shape", [(8, 24), (24, 8), (3, 16, 8)])
def test_orthogonalize(shape: tuple[int, ...]) -> None:
    values = torch.linalg.svdvals(orthogonalize(torch.randn(shape, generator=torch.Generator().manual_seed(0))))
    assert 0.5 < values.min() <= values.max() < 1.5
