"""The whole training: tokenizer, context tower, denoiser, calibration. An interrupted run continues where it stopped."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tokenizers import Tokenizer

from twotower.model.checkpoint import Checkpoint
from twotower.model.weights import load_context_tower, load_denoiser_tower, resolve_device
from twotower.train.calibrate import calibrate
from twotower.train.denoiser import Masking
from twotower.train.export import TOKENIZER_FILE
from twotower.train.probe import Probe, probe_context, probe_denoiser, probe_texts
from twotower.train.run import TrainConfig, train_context, train_denoiser, write_tokenizer

PROBED, PROBED_CPU = 256, 24
"""Tasks of each family on which a phase's result is measured, with a GPU and without one."""

PROBE_SEED = 424242

GAMMA = 0.8
"""The gamma at which the denoiser is measured."""


@dataclass(frozen=True, slots=True)
class PipelineConfig:
    """The settings of the whole training."""

    train: TrainConfig
    """The settings of both towers; `minutes` is the time of the whole, `run_dir` holds a directory for each phase."""
    context_share: float = 0.25
    """Share of the time, or of the steps, that goes to the context tower: the denoiser learns more slowly."""
    masking: Masking = field(default_factory=Masking)
    denoiser_drills: float = 0.06
    """Share of drills for the denoiser."""


def train_all(config: PipelineConfig) -> None:
    """Train both towers on the built-in tasks; writes a checkpoint of both. Raises TwoTowerError."""
    train = config.train
    tokenizer = train.run_dir / TOKENIZER_FILE
    if not tokenizer.exists():
        _say("tokenizer: from the built-in tasks")
        part = tokenizer.with_suffix(".part")
        write_tokenizer(part, None, None, train.loop.seed, train.tasks)
        part.replace(tokenizer)
    context = train.run_dir / "context"
    _say(f"context tower: for {_length(train, config.context_share)}")
    train_context(_phase(train, "context-run", context, config.context_share), tokenizer)
    _tolerating_errors(lambda: _report_context(context, train))
    _say(f"denoiser: for {_length(train, 1 - config.context_share)}")
    phase = _phase(train, "denoiser-run", train.out, 1 - config.context_share)
    train_denoiser(dataclasses.replace(phase, drill_share=config.denoiser_drills), context, masking=config.masking)
    _tolerating_errors(lambda: _report_denoiser(train.out, train))
    _tolerating_errors(lambda: _calibrate(train))


def _phase(train: TrainConfig, name: str, out: Path, share: float) -> TrainConfig:
    loop = dataclasses.replace(train.loop, minutes=train.loop.minutes * share, steps=max(1, round(train.loop.steps * share)))
    return dataclasses.replace(train, run_dir=train.run_dir / name, out=out, loop=loop)


def _length(train: TrainConfig, share: float) -> str:
    return f"{train.loop.minutes * share:.1f} minutes, or {round(train.loop.steps * share):,} steps"


def _report_context(path: Path, train: TrainConfig) -> None:
    checkpoint, device = Checkpoint.open(path, towers=("context",)), resolve_device(train.device)
    tower = load_context_tower(checkpoint, torch.float32, device, kernels="torch")
    for name, batches in probe_texts(_tokenizer(checkpoint), train.tasks, "eval", PROBE_SEED, _probed(device), 16).items():
        started = time.monotonic()
        probe = probe_context(tower, batches, eos=checkpoint.config.eos_token_ids[0], bf16=train.loop.bf16)
        _say(f"AR, {name}: {_shown(probe)}, measured in {time.monotonic() - started:.1f} s")


def _report_denoiser(path: Path, train: TrainConfig) -> None:
    checkpoint, device = Checkpoint.open(path), resolve_device(train.device)
    context = load_context_tower(checkpoint, torch.float32, device, kernels="torch")
    tower = load_denoiser_tower(checkpoint, torch.float32, device, kernels="torch")
    for block in train.blocks or (checkpoint.config.block_size,):
        texts = probe_texts(_tokenizer(checkpoint), train.tasks, "eval", PROBE_SEED, _probed(device), block)
        for name, batches in texts.items():
            probe = probe_denoiser(tower, context, batches, gamma=GAMMA, bf16=train.loop.bf16)
            _say(f"diffusion, block {block}, {name}: {_shown(probe)}")


def _calibrate(train: TrainConfig) -> None:
    count = 2 * _probed(resolve_device(train.device))
    _say(f"calibration: {calibrate(train.out, train.out, train.tasks, train.device, count)}")


def _probed(device: torch.device) -> int:
    return PROBED_CPU if device.type == "cpu" else PROBED


def _tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    assert checkpoint.tokenizer_path is not None
    return Tokenizer.from_file(str(checkpoint.tokenizer_path))


def _shown(probe: Probe) -> str:
    return f"{probe.exact:.1%} exact, {probe.tokens_per_forward:.2f} tokens a forward"


def _tolerating_errors(report: Callable[[], None]) -> None:
    """Run a measurement; its failure is printed and does not end the training."""
    try:
        report()
    except Exception as error:
        _say(f"not measured: {type(error).__name__}: {error}")


def _say(line: str) -> None:
    print(f"[train] {line}", file=sys.stderr, flush=True)
