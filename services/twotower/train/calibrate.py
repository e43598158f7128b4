"""Confidence calibration: fits the denoiser's confidence to how often it is right, on held-out training tasks.

The head's weights are multiplied by one scale, the inverse of a temperature, which leaves the likeliest tokens unchanged.
Of the scales below, the greatest is chosen at which diffusion writes as many correct texts as at the best scale, within a
tolerance: the fastest one that costs no quality.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer

from twotower.model.checkpoint import Checkpoint
from twotower.model.tensors import context_tensors, denoiser_tensors
from twotower.model.weights import load_context_tower, load_denoiser_tower, read_tensors, resolve_device
from twotower.train.export import write_checkpoint, write_sharded
from twotower.train.probe import Probe, probe_denoiser, probe_texts

SCALES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
HELD_OUT_SEED = 31337
"""A seed of the training split that no run uses."""

TOLERANCE = 0.003
"""The share of correct texts that a faster scale may lose."""

GAMMA = 0.8


@dataclass(frozen=True, slots=True)
class Calibration:
    """The chosen scale, and the results of all scales."""

    scale: float
    tried: dict[float, dict[str, Probe]]
    """Scale -> family -> result."""

    def __str__(self) -> str:
        shown = (
            f"{scale:g}: " + ", ".join(f"{name} {p.exact:.1%} at {p.tokens_per_forward:.1f}" for name, p in probes.items())
            for scale, probes in self.tried.items()
        )
        return f"head scale {self.scale:g} of [{'; '.join(shown)}]"


def measure(path: Path, tasks: str, device_name: str, count: int, block: int | None = None) -> Calibration:
    """Measure all scales on `count` held-out tasks of each family."""
    checkpoint, device = Checkpoint.open(path), resolve_device(device_name)
    assert checkpoint.tokenizer_path is not None
    tokenizer = Tokenizer.from_file(str(checkpoint.tokenizer_path))
    context = load_context_tower(checkpoint, torch.float32, device, kernels="torch")
    tower = load_denoiser_tower(checkpoint, torch.float32, device, kernels="torch")
    texts = probe_texts(tokenizer, tasks, "train", HELD_OUT_SEED, count, block or checkpoint.config.block_size)
    bf16 = device.type != "cpu"
    tried = {
        scale: {
            name: probe_denoiser(tower, context, batches, gamma=GAMMA, scale=scale, bf16=bf16)
            for name, batches in texts.items()
        }
        for scale in SCALES
    }
    return Calibration(choose({scale: _mean(probes) for scale, probes in tried.items()}), tried)


def choose(exact: dict[float, float]) -> float:
    """The greatest scale within the tolerance of the best."""
    best = max(exact.values())
    return max(scale for scale, share in exact.items() if share >= best - TOLERANCE)


def calibrate(path: Path, out: Path, tasks: str, device_name: str, count: int = 512) -> Calibration:
    """Measure, and write a checkpoint with the chosen scale."""
    result = measure(path, tasks, device_name, count)
    apply_scale(path, out, result.scale)
    return result


def apply_scale(path: Path, out: Path, scale: float) -> None:
    """Write the checkpoint with its denoiser's head scaled."""
    checkpoint = Checkpoint.open(path)
    assert checkpoint.tokenizer_path is not None
    names = [name for name, _ in (*context_tensors(checkpoint.config), *denoiser_tensors(checkpoint.config))]
    tensors = read_tensors(checkpoint, names)
    head = tensors["lm_head.weight"]
    tensors["lm_head.weight"] = (head.float() * scale).to(head.dtype)
    raw = json.loads((path / "config.json").read_text(encoding="utf-8"))
    sharded = (path / "model.safetensors.index.json").exists()
    part = out.with_name(out.name + ".part")
    (write_sharded if sharded else write_checkpoint)(part, raw, tensors, checkpoint.tokenizer_path)
    out.mkdir(parents=True, exist_ok=True)
    for file in part.iterdir():
        file.replace(out / file.name)
    shutil.rmtree(part)


def _mean(probes: dict[str, Probe]) -> float:
    return sum(probe.exact for probe in probes.values()) / len(probes)
