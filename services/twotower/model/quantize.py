"""Writing a checkpoint whose routed experts are stored in 8 or 4 bits; everything else is copied as it is."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from twotower.errors import ConfigError
from twotower.model.checkpoint import INDEX_FILE, SINGLE_FILE, Checkpoint, resolve_experts
from twotower.model.config import ModelConfig
from twotower.model.experts import EXPERT, quantize_named
from twotower.model.identity import CONTENT_KEY, combined_content
from twotower.model.tensors import CONTEXT_PREFIXES, EXPERT_PARTS, context_tensors, denoiser_tensors
from twotower.model.weights import read_tensors, write_tensors

SHARD_BYTES = 4 << 30
"""Of a shard, about: what is held in memory at once."""

_TENSORS = {"context": context_tensors, "denoiser": denoiser_tensors}


@dataclass(frozen=True, slots=True)
class Sizes:
    """Bytes of all tensors, before and after."""

    before: int
    after: int


def quantize_checkpoint(
    checkpoint: Checkpoint, out: Path, experts: str, towers: Sequence[str], shard_bytes: int = SHARD_BYTES
) -> Sizes:
    """Write `checkpoint` to the directory `out` with the experts of these towers ("context", "denoiser") in fp8 or fp4.

    Both towers are written, each to shards of its own where one file would hold more than `shard_bytes`; read and
    written a shard at a time. config.json says what is quantized (`context_experts`, `denoiser_experts`).
    Raises CheckpointError, which names the tensor, and ConfigError.
    """
    config, wanted = checkpoint.config, {f"{tower}_experts": experts for tower in towers}
    for name in wanted:
        if resolve_experts(experts, getattr(config, name)) == getattr(config, name):
            raise ConfigError(f"experts: the checkpoint stores the {name.partition('_')[0]}'s in {experts} already")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"out: {out} exists and is not an empty directory")
    out.mkdir(parents=True, exist_ok=True)
    new = dataclasses.replace(config, **wanted)  # type: ignore[arg-type]  # of strings, which these fields are
    shards = list(_shards(checkpoint, shard_bytes))
    files = [SINGLE_FILE]
    if len(shards) > 1:
        files = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    index: dict[str, str] = {}
    contents: dict[str, str] = {}
    after = 0
    for file, names in zip(files, shards, strict=True):
        tensors = _converted(checkpoint, new, names)
        contents[file] = write_tensors(out / file, tensors)
        index |= dict.fromkeys(tensors, file)
        after += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if len(shards) > 1:
        told = {"metadata": {"total_size": after, CONTENT_KEY: combined_content(contents)}, "weight_map": index}
        (out / INDEX_FILE).write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    raw: dict[str, Any] = json.loads((checkpoint.path / "config.json").read_text(encoding="utf-8"))
    (out / "config.json").write_text(json.dumps({**raw, **wanted}, indent=1) + "\n", encoding="utf-8")
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        if (checkpoint.path / file).exists():
            shutil.copy2(checkpoint.path / file, out / file)
    return Sizes(sum(checkpoint.tensors[name].num_bytes for names in shards for name in names), after)


def _shards(checkpoint: Checkpoint, shard_bytes: int) -> Iterator[list[str]]:
    """Names of tensors that are written together; of one tower, unless all fit together."""
    towers = [[name for name, _ in tensors(checkpoint.config)] for tensors in _TENSORS.values()]
    sizes = {name: checkpoint.tensors[name].num_bytes for names in towers for name in names}
    if sum(sizes.values()) <= shard_bytes:
        yield list(sizes)
        return
    for names in towers:
        shard: list[str] = []
        held = 0
        for name in names:
            if shard and held + sizes[name] > shard_bytes:
                yield shard
                shard, held = [], 0
            shard.append(name)
            held += sizes[name]
        yield shard


def _converted(checkpoint: Checkpoint, new: ModelConfig, names: list[str]) -> dict[str, Tensor]:
    """The tensors as they are to be stored, by their new names."""
    out: dict[str, Tensor] = {}
    for name, tensor in read_tensors(checkpoint, names).items():
        tower = "context_experts" if name.startswith(CONTEXT_PREFIXES) else "denoiser_experts"
        precision = getattr(new, tower)
        if EXPERT.match(name) is None or precision == getattr(checkpoint.config, tower):
            out[name] = tensor
            continue
        stem = name.removesuffix("weight")
        for part, stored in zip(EXPERT_PARTS[precision], quantize_named(name, tensor, precision).tensors, strict=True):
            out[stem + part] = stored
    return out
