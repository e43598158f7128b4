"""Small random checkpoints with every kind of layer, in the published layout."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from twotower.model.config import ModelConfig
from twotower.model.tensors import context_tensors, denoiser_tensors
from twotower.model.weights import save_checkpoint, write_tensors

TINY: dict[str, Any] = {
    "model_type": "nemotron_h",
    "torch_dtype": "float32",
    "vocab_size": 96,
    "hidden_size": 32,
    "hybrid_override_pattern": "ME*-M*E",
    "num_hidden_layers": 7,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "mamba_num_heads": 4,
    "mamba_head_dim": 8,
    "ssm_state_size": 8,
    "n_groups": 2,
    "conv_kernel": 4,
    "chunk_size": 16,
    "time_step_limit": [0.0, math.inf],
    "intermediate_size": 48,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 24,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
    "n_group": 2,
    "topk_group": 1,
    "layer_norm_epsilon": 1e-5,
    "eos_token_id": 2,
    "max_position_embeddings": 4096,
}


def random_tensors(config: ModelConfig, seed: int = 0) -> dict[str, Tensor]:
    """All tensors of a checkpoint, at scales that keep activations near 1."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in (*context_tensors(config), *denoiser_tensors(config)):
        if name.endswith("norm.weight") or name.endswith("norm_f.weight") or name.endswith(".D"):
            tensors[name] = 1 + 0.1 * torch.randn(shape, generator=generator)
        elif name.endswith("A_log"):
            tensors[name] = torch.rand(shape, generator=generator) * 2
        elif name.endswith("dt_bias"):
            tensors[name] = torch.randn(shape, generator=generator) - 2
        elif len(shape) >= 2:
            tensors[name] = torch.randn(shape, generator=generator) * (2 / shape[-1] ** 0.5 if "conv1d" not in name else 0.5)
        else:
            tensors[name] = 0.1 * torch.randn(shape, generator=generator)
    return tensors


def write_tiny_checkpoint(path: Path, seed: int = 0, **overrides: Any) -> Path:
    """A single-file checkpoint; `overrides` replace keys of its config.json."""
    raw = {**TINY, **overrides}
    raw["num_hidden_layers"] = len(raw["hybrid_override_pattern"])
    save_checkpoint(path, raw, random_tensors(ModelConfig.from_dict(raw), seed))
    return path


def write_sharded_checkpoint(path: Path, seed: int = 0, *, hashed: bool = False, **overrides: Any) -> Path:
    """The same, with the context tower and the denoiser in a shard each. hashed: each says what it holds, as ours do."""
    raw = {**TINY, **overrides}
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(raw))
    tensors = random_tensors(ModelConfig.from_dict(raw), seed)
    shards: dict[str, dict[str, Tensor]] = {"model-00001-of-00002.safetensors": {}, "model-00002-of-00002.safetensors": {}}
    first, second = shards
    for name, tensor in tensors.items():
        shards[first if name.startswith("context") else second][name] = tensor
    for file, held in shards.items():
        (write_tensors if hashed else _plain)(path / file, held)
    weight_map = {name: file for file, held in shards.items() for name in held}
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


def _plain(file: Path, tensors: dict[str, Tensor]) -> None:
    save_file(tensors, file)
