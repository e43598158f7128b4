"""A medium-sized checkpoint with random weights: big enough that its time goes into computing, not into Python."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from twotower.model.config import ModelConfig
from twotower.model.weights import export_tensors, save_checkpoint
from twotower.train.start import new_context_tower, new_denoiser_tower

MIDDLE: dict[str, Any] = {
    "architectures": ["NemotronHTwoTowerForCausalLM"],
    "model_type": "nemotron_h",
    "torch_dtype": "bfloat16",
    "vocab_size": 16384,
    "hidden_size": 768,
    "num_hidden_layers": 18,
    "hybrid_override_pattern": "MEMEM*EMEMEM*EMEME",
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "mamba_num_heads": 24,
    "mamba_head_dim": 64,
    "ssm_state_size": 64,
    "n_groups": 4,
    "conv_kernel": 4,
    "chunk_size": 128,
    "time_step_limit": [0.0, math.inf],
    "intermediate_size": 1536,
    "n_routed_experts": 128,
    "num_experts_per_tok": 6,
    "moe_intermediate_size": 128,
    "moe_shared_expert_intermediate_size": 768,
    "n_shared_experts": 1,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
    "n_group": 1,
    "topk_group": 1,
    "layer_norm_epsilon": 1e-5,
    "mlp_hidden_act": "relu2",
    "mamba_hidden_act": "silu",
    "use_conv_bias": True,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "mask_token_id": 3,
    "max_position_embeddings": 32768,
    "block_size": 16,
}
"""`config.json`: the published model's pattern and its 128 experts, 6 a token, with everything narrower."""


def write_random_checkpoint(path: Path, seed: int = 0, raw: dict[str, Any] | None = None) -> int:
    """Write both towers in bf16; returns the number of parameters of a tower."""
    raw = MIDDLE if raw is None else raw
    context = new_context_tower(ModelConfig.from_dict(raw), seed)
    denoiser = new_denoiser_tower(context)
    save_checkpoint(path, raw, export_tensors(context, torch.bfloat16) | export_tensors(denoiser, torch.bfloat16))
    return sum(parameter.numel() for parameter in context.parameters())
