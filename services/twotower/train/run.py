"""The training commands as functions: corpus, tokenizer, context tower, denoiser."""

from __future__ import annotations

import itertools
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from twotower.errors import CheckpointError, ConfigError
from twotower.model.checkpoint import Checkpoint
from twotower.model.config import ModelConfig
from twotower.model.tensors import context_tensors
from twotower.model.weights import (
    export_tensors,
    load_context_tower,
    load_denoiser_tower,
    read_tensors,
    resolve_device,
    save_checkpoint,
)
from twotower.train.bpe import train_tokenizer
from twotower.train.context import ContextTask
from twotower.train.corpus import DRILL_SHARE, Source, built_in, from_corpus
from twotower.train.denoiser import DenoiserTask, weights_hash
from twotower.train.loop import METRICS_FILE, Loop, LoopConfig, Task
from twotower.train.plot import can_plot, plot_loss
from twotower.train.problems import problems
from twotower.train.start import WORD_PROBLEMS, new_context_tower, new_denoiser_tower
from twotower.train.story import MAX_NUMBER

TOKENIZER_POOLS = range(1_000_000, 1_000_010)
"""Pools of the built-in problems that the tokenizer learns from; no run reaches them."""

MAX_NUMBER_IN_WORDS = 50
"""Up to here the built-in tokenizer keeps numbers whole."""


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """What both trainers are told."""

    out: Path
    """Checkpoint directory to write."""
    run_dir: Path
    """State to resume from, and metrics."""
    corpus: Path | None
    """The user's own texts (`from_corpus`); None: the built-in problems."""
    rows: int
    """Texts in a batch."""
    threads: int
    device: str
    """auto, cpu, cuda or cuda:N."""
    loop: LoopConfig
    init: Path | None = None
    """Checkpoint whose weights to start from, instead of fresh ones."""
    drill_share: float = DRILL_SHARE
    """Share of drills among the built-in problems."""
    max_number: int = MAX_NUMBER
    """Greatest number in the built-in problems."""


def write_corpus(path: Path, split: str, count: int, seed: int) -> None:
    """Built-in problems as JSONL, in the form a user's own corpus has."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for p in itertools.islice(problems(split, seed), count):
            file.write(json.dumps({"prompt": p.question, "completion": "\n" + p.solution, "answer": p.answer}) + "\n")


def write_tokenizer(path: Path, corpus: Path | None, vocab_size: int, seed: int) -> None:
    """Train a tokenizer on the corpus and save it as `tokenizer.json`."""
    source = built_in(seed, max_number=MAX_NUMBER_IN_WORDS) if corpus is None else from_corpus(corpus, seed)
    texts = (t.prompt + t.completion for n in (TOKENIZER_POOLS if corpus is None else range(1)) for t in source(n))
    path.parent.mkdir(parents=True, exist_ok=True)
    train_tokenizer(texts, vocab_size).save(str(path))


def train_context(config: TrainConfig, tokenizer_path: Path, prompt_weight: float = 0.1) -> None:
    """Train a context tower; writes a checkpoint that holds it alone."""
    torch.set_num_threads(config.threads)
    tokenizer = _tokenizer(tokenizer_path)
    raw = {**WORD_PROBLEMS, "vocab_size": tokenizer.get_vocab_size()}
    model = new_context_tower(ModelConfig.from_dict(raw), config.loop.seed)
    if config.init is not None:
        start = Checkpoint.open(config.init, towers=("context",))
        model.load_state_dict(load_context_tower(start, torch.float32, torch.device("cpu")).state_dict())
    model.to(resolve_device(config.device))
    source = _source(config, config.loop.seed)
    task = ContextTask(model, source, tokenizer, rows=config.rows, prompt_weight=prompt_weight, bf16=config.loop.bf16)
    loop = _run(task, config)
    model.load_state_dict(loop.ema)
    _write(config.out, raw, {**export_tensors(model, torch.bfloat16)}, tokenizer_path)


def train_denoiser(
    config: TrainConfig, context_path: Path, *, all_masked: float = 0.0, own_order: float = 0.0, head_scale: float = 1.0
) -> None:
    """Train a denoiser against the frozen context tower of a checkpoint; writes a checkpoint of both towers.

    head_scale: what the head's weights are multiplied by at the end. The likeliest tokens stay what they are; below 1,
    the denoiser is less sure of them, so that a gamma commits fewer at a time.
    """
    torch.set_num_threads(config.threads)
    checkpoint = Checkpoint.open(context_path, towers=("context",))
    if checkpoint.tokenizer_path is None:
        raise CheckpointError(f"{context_path} has no tokenizer.json")
    device = resolve_device(config.device)
    context = load_context_tower(checkpoint, torch.float32, device)
    frozen = weights_hash(context)
    model = new_denoiser_tower(context)
    if config.init is not None:
        start = Checkpoint.open(config.init, towers=("denoiser",))
        model.load_state_dict(load_denoiser_tower(start, torch.float32, torch.device("cpu")).state_dict())
    model.to(device)
    # Other problems than the context tower was trained on: the state of a text it knows by heart is no guide.
    source = _source(config, config.loop.seed + 1)
    task = DenoiserTask(
        model,
        context,
        source,
        _tokenizer(checkpoint.tokenizer_path),
        rows=config.rows,
        all_masked=all_masked,
        own_order=own_order,
        bf16=config.loop.bf16,
    )
    loop = _run(task, config)
    assert weights_hash(context) == frozen, "the context tower changed while the denoiser was trained"
    model.load_state_dict(loop.ema)
    with torch.no_grad():
        model.lm_head.weight.mul_(head_scale)
    raw = json.loads((context_path / "config.json").read_text(encoding="utf-8"))
    # The context's tensors are copied, not exported: they are to be the same bits, in whatever dtype they are.
    same = read_tensors(checkpoint, (name for name, _ in context_tensors(checkpoint.config)))
    tensors = same | export_tensors(model, torch.bfloat16)
    _write(config.out, raw, tensors, checkpoint.tokenizer_path)


def _run(task: Task, config: TrainConfig) -> Loop:
    """Train to the end; the curve is drawn whether it ends well or not."""
    loop = Loop(task, config.loop, config.run_dir)
    try:
        loop.run()
    finally:
        if can_plot():
            plot_loss(config.run_dir / METRICS_FILE, config.run_dir / "loss.png")
    return loop


def _source(config: TrainConfig, seed: int) -> Source:
    if config.corpus is not None:
        return from_corpus(config.corpus, seed)
    return built_in(seed, drill_share=config.drill_share, max_number=config.max_number)


def _tokenizer(path: Path) -> Tokenizer:
    if not path.is_file():
        raise ConfigError(f"tokenizer {path} does not exist")
    return Tokenizer.from_file(str(path))


def _write(out: Path, raw: dict[str, Any], tensors: dict[str, torch.Tensor], tokenizer: Path) -> None:
    save_checkpoint(out, raw, tensors)
    if tokenizer.resolve() != (out / "tokenizer.json").resolve():
        shutil.copy(tokenizer, out / "tokenizer.json")
    Checkpoint.open(out, towers=("context",))
