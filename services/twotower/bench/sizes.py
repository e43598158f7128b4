"""Bytes on the wire at the published model's size: a snapshot, and the delta of a block."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from twotower.model.config import ModelConfig
from twotower.wire.frames import Key, Spec, to_frames
from twotower.wire.state import delta_spec, state_spec

REAL: dict[str, Any] = {
    "model_type": "nemotron_h",
    "torch_dtype": "bfloat16",
    "vocab_size": 131072,
    "hidden_size": 2688,
    "num_hidden_layers": 52,
    "hybrid_override_pattern": "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
    "num_attention_heads": 32,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "mamba_num_heads": 64,
    "mamba_head_dim": 64,
    "ssm_state_size": 128,
    "n_groups": 8,
    "conv_kernel": 4,
    "chunk_size": 128,
    "time_step_limit": [0.0, math.inf],
    "intermediate_size": 1856,
    "n_routed_experts": 128,
    "num_experts_per_tok": 6,
    "moe_intermediate_size": 1856,
    "moe_shared_expert_intermediate_size": 3712,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
    "n_group": 1,
    "topk_group": 1,
    "layer_norm_epsilon": 1e-5,
    "eos_token_id": 2,
    "mask_token_id": 3,
    "max_position_embeddings": 262144,
    "block_size": 16,
}
"""Nemotron-3-Nano-30B-A3B's shape."""


def delta_bytes(block: int = 16) -> int:
    """Bytes sent to a worker after a block: all frames with their headers."""
    return _framed(delta_spec(ModelConfig.from_dict(REAL), torch.bfloat16, 1, block))


def snapshot_bytes(length: int = 1024) -> int:
    """Bytes sent to a worker that attaches to a session of `length` tokens."""
    return _framed(state_spec(ModelConfig.from_dict(REAL), torch.bfloat16, length))


def _framed(spec: Mapping[Key, Spec]) -> int:
    frames = to_frames((key, torch.zeros(each.shape, dtype=each.dtype)) for key, each in spec.items())
    return sum(batch.ByteSize() for batch in frames)
