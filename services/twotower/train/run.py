"""The training commands as functions: corpus, tokenizer, context tower, denoiser."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

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
)
from twotower.train.bpe import VOCAB_SIZE, train_tokenizer, whole_word_tokenizer
from twotower.train.context import ContextPools, ContextTask
from twotower.train.corpus import POOL_SIZE, BuiltIn, Source, from_corpus
from twotower.train.denoiser import BlockPools, DenoiserTask, Masking, weights_hash
from twotower.train.export import averaged, write_checkpoint, write_sharded
from twotower.train.families.answers import NumberCheck
from twotower.train.families.item import Split
from twotower.train.families.registry import TASKS
from twotower.train.loop import METRICS_FILE, Loop, LoopConfig, Task
from twotower.train.plot import can_plot, plot_loss
from twotower.train.start import SHAPES, new_context_tower, new_denoiser_tower

TOKENIZER_POOLS = 1_000_000
"""The number of the first pool of built-in tasks that the tokenizer learns from; no run reaches it."""

STORY_POOLS, SUITE_POOLS = 10, 24
"""The number of pools from which the tokenizer learns."""

STORY_NUMBERS = 50
"""The greatest number that is one token in the stories' tokenizer."""

RAREST = 8
"""A word of the suite that occurs at least `RAREST` times in these pools is one token."""

PIECES = 200
"""The number of pieces of other words in the suite's tokenizer."""

BLOCKS: dict[int, float] = {4: 0.12, 8: 0.2, 16: 0.43, 32: 0.25}
"""Block sizes that a denoiser of the suite learns, and their shares of its batches."""

Write = Callable[[Path, dict[str, Any], Mapping[str, Tensor], Path], None]


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """The settings of both trainers."""

    out: Path
    """Checkpoint directory to write."""
    run_dir: Path
    """Directory of the state to resume from, and of metrics."""
    corpus: Path | None
    """The user's own texts (`from_corpus`); None: the built-in tasks."""
    rows: int
    """Texts of average length in a batch."""
    threads: int
    device: str
    """auto, cpu, cuda or cuda:N."""
    loop: LoopConfig
    init: Path | None = None
    """Checkpoint whose weights to start from, instead of fresh ones."""
    tasks: str = "stories"
    """The built-in tasks, a name of `TASKS`, which also decides the model's shape."""
    drill_share: float | None = None
    """Share of drills among the built-in tasks; None: the tasks' own."""
    max_number: int | None = None
    """The greatest number in the built-in problems; None: the tasks' own."""
    workers: int = 0
    """Processes that make batches of built-in tasks ahead of time; 0: none."""
    pool_size: int = POOL_SIZE
    """Built-in tasks in a pool, which is sorted into batches."""
    snapshots: bool = False
    """Whether to write the checkpoint whenever the state is saved, in a file for each tower; else once at the end, in one."""
    blocks: Mapping[int, float] | None = None
    """Block sizes that a denoiser learns, and their shares; None: only the checkpoint's own."""


def write_corpus(path: Path, split: Split, count: int, seed: int, tasks: str = "stories") -> None:
    """Write built-in tasks of each family in turn as JSONL, in the form of a user's own corpus."""
    path.parent.mkdir(parents=True, exist_ok=True)
    chosen = TASKS[tasks]
    streams = [make(split, seed, chosen.max_number) for make in chosen.families.values()]
    with path.open("w", encoding="utf-8") as file:
        for item in itertools.islice((next(stream) for stream in itertools.cycle(streams)), count):
            row: dict[str, object] = {"prompt": item.prompt, "completion": "\n" + item.completion, "family": item.family}
            if isinstance(item.check, NumberCheck):
                row["answer"] = item.check.answer
            file.write(json.dumps(row) + "\n")


def write_tokenizer(path: Path, corpus: Path | None, vocab_size: int | None, seed: int, tasks: str = "stories") -> None:
    """Train a tokenizer on the corpus and save it as `tokenizer.json`.

    vocab_size None: `VOCAB_SIZE`, or for the suite the number that its words need.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    suite = corpus is None and tasks == "suite"
    if corpus is not None:
        source, pools = from_corpus(corpus, seed), range(1)
    elif suite:
        source, pools = BuiltIn(seed, tasks), range(TOKENIZER_POOLS, TOKENIZER_POOLS + SUITE_POOLS)
    else:
        source = BuiltIn(seed, tasks, max_number=STORY_NUMBERS)
        pools = range(TOKENIZER_POOLS, TOKENIZER_POOLS + STORY_POOLS)
    texts = (t.prompt + t.completion for number in pools for t in source(number))
    if suite and vocab_size is None:
        numbers = [number for i in range(TASKS[tasks].max_number + 1) for number in (f" {i}", str(i))]
        whole_word_tokenizer(texts, pieces=PIECES, rarest=RAREST, words=numbers).save(str(path))
    else:
        train_tokenizer(texts, vocab_size or VOCAB_SIZE).save(str(path))


def train_context(config: TrainConfig, tokenizer_path: Path, prompt_weight: float = 0.1) -> None:
    """Train a context tower; writes a checkpoint of this tower alone."""
    torch.set_num_threads(config.threads)
    tokenizer = _tokenizer(tokenizer_path)
    raw = {**SHAPES[config.tasks], "vocab_size": tokenizer.get_vocab_size()}
    model = new_context_tower(ModelConfig.from_dict(raw), config.loop.seed)
    if config.init is not None:
        start = Checkpoint.open(config.init, towers=("context",))
        model.load_state_dict(load_context_tower(start, torch.float32, torch.device("cpu"), kernels="torch").state_dict())
    model.to(_device(config))
    pools = ContextPools(_source(config, config.loop.seed), tokenizer, config.rows, prompt_weight)
    task = ContextTask(model, pools, bf16=config.loop.bf16, workers=_workers(config))

    def write(ema: Mapping[str, Tensor]) -> None:
        write_checkpoint(config.out, raw, export_tensors(averaged(model, ema), torch.bfloat16), tokenizer_path)

    write(_run(task, config, write).ema)


def train_denoiser(config: TrainConfig, context_path: Path, *, masking: Masking | None = None, head_scale: float = 1.0) -> None:
    """Train a denoiser against the frozen context tower of a checkpoint; writes a checkpoint of both towers.

    head_scale: a factor of the head's weights, applied at the end. It leaves the likeliest tokens unchanged; below 1 it makes
    the denoiser less confident, so that a gamma commits fewer tokens at a time.
    """
    torch.set_num_threads(config.threads)
    checkpoint = Checkpoint.open(context_path, towers=("context",))
    if (tokenizer := checkpoint.tokenizer_path) is None:
        raise CheckpointError(f"{context_path} has no tokenizer.json")
    device = _device(config)
    context = load_context_tower(checkpoint, torch.float32, device, kernels="torch")
    frozen = weights_hash(context)
    model = new_denoiser_tower(context)
    if config.init is not None:
        start = Checkpoint.open(config.init, towers=("denoiser",))
        model.load_state_dict(load_denoiser_tower(start, torch.float32, torch.device("cpu"), kernels="torch").state_dict())
    model.to(device)
    # Problems that the context tower was not trained on, since the state of a memorized text is not representative.
    blocks = config.blocks or {checkpoint.config.block_size: 1.0}
    pools = BlockPools(_source(config, config.loop.seed + 1), _tokenizer(tokenizer), config.rows, blocks)
    workers = _workers(config)
    task = DenoiserTask(model, context, pools, masking=masking or Masking(), bf16=config.loop.bf16, workers=workers)
    raw = json.loads((context_path / "config.json").read_text(encoding="utf-8"))
    # The context's tensors are copied, not exported, so that their bits stay the same in any dtype.
    same = read_tensors(checkpoint, (name for name, _ in context_tensors(checkpoint.config)))

    def write(ema: Mapping[str, Tensor]) -> None:
        assert weights_hash(context) == frozen, "the context tower changed while the denoiser was trained"
        best = averaged(model, ema)
        with torch.no_grad():
            best.lm_head.weight.mul_(head_scale)
        form: Write = write_sharded if config.snapshots else write_checkpoint
        form(config.out, raw, same | export_tensors(best, torch.bfloat16), tokenizer)

    write(_run(task, config, write).ema)


def _run(task: Task, config: TrainConfig, write: Callable[[Mapping[str, Tensor]], None]) -> Loop:
    """Train to the end; the loss curve is drawn even if training fails."""
    loop = Loop(task, config.loop, config.run_dir, write if config.snapshots else None)
    try:
        loop.run()
    finally:
        if can_plot():
            plot_loss(config.run_dir / METRICS_FILE, config.run_dir / "loss.png")
    return loop


def _source(config: TrainConfig, seed: int) -> Source:
    if config.corpus is not None:
        return from_corpus(config.corpus, seed)
    return BuiltIn(seed, config.tasks, "train", config.pool_size, config.drill_share, config.max_number)


def _workers(config: TrainConfig) -> int:
    """The number of worker processes: none for a user's corpus, which is in memory."""
    return config.workers if config.corpus is None else 0


def _device(config: TrainConfig) -> torch.device:
    device = resolve_device(config.device)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # the scan's products in tf32, whose error is below training's noise
    return device


def _tokenizer(path: Path) -> Tokenizer:
    if not path.is_file():
        raise ConfigError(f"tokenizer {path} does not exist")
    return Tokenizer.from_file(str(path))
