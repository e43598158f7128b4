"""The shape of the shipped model, and the weights that training starts from."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from twotower.model.config import ModelConfig
from twotower.model.context_tower import ContextTower
from twotower.model.denoiser_tower import DenoiserTower
from twotower.model.layers import Mamba2, Router
from twotower.train.bpe import BOS, EOS, MASK, PAD

WORD_PROBLEMS: dict[str, Any] = {
    "architectures": ["NemotronHTwoTowerForCausalLM"],
    "model_type": "nemotron_h",
    "torch_dtype": "bfloat16",
    "vocab_size": 879,
    "hidden_size": 192,
    "num_hidden_layers": 9,
    "hybrid_override_pattern": "M*EM*EM*E",
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "mamba_num_heads": 6,
    "mamba_head_dim": 64,
    "ssm_state_size": 32,
    "n_groups": 2,
    "conv_kernel": 4,
    "chunk_size": 128,
    "time_step_limit": [0.0, math.inf],
    "intermediate_size": 384,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 256,
    "moe_shared_expert_intermediate_size": 384,
    "n_shared_experts": 1,
    "routed_scaling_factor": 1.0,
    "norm_topk_prob": True,
    "n_group": 1,
    "topk_group": 1,
    "layer_norm_epsilon": 1e-5,
    "residual_in_fp32": False,
    "attention_bias": False,
    "mlp_bias": False,
    "use_bias": False,
    "mamba_proj_bias": False,
    "use_conv_bias": True,
    "mlp_hidden_act": "relu2",
    "mamba_hidden_act": "silu",
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "mask_token_id": MASK,
    "max_position_embeddings": 4096,
    "block_size": 16,
}
"""`config.json` of the shipped checkpoint, in the published keys."""

SUITE: dict[str, Any] = {
    **WORD_PROBLEMS,
    "vocab_size": 2288,
    "num_hidden_layers": 12,
    "hybrid_override_pattern": "M*EM*EM*EM*E",
}
"""The config of a model of three families, with one more group of layers."""

SHAPES: dict[str, dict[str, Any]] = {"stories": WORD_PROBLEMS, "suite": SUITE}
"""The shapes, by name of the built-in tasks."""


def new_context_tower(config: ModelConfig, seed: int) -> ContextTower:
    """A context tower with fresh fp32 weights."""
    tower = ContextTower(config)
    generator = torch.Generator().manual_seed(seed)
    _init(tower, config, generator)
    return tower


def new_denoiser_tower(context: ContextTower) -> DenoiserTower:
    """A copy of the context tower, with a time conditioning without effect yet: shift 0, scale 0, gate 1 for every t."""
    config = context.config
    tower = DenoiserTower(config)
    tower.denoiser_tower.load_state_dict(context.context_tower.state_dict())
    tower.lm_head.load_state_dict(context.context_lm_head.state_dict())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in tower.t_embedder.modules():
            if isinstance(module, nn.Linear):
                module.weight.normal_(std=module.in_features**-0.5, generator=generator)
                module.bias.zero_()
        for parameter in tower.t_block.parameters():
            parameter.zero_()
        for table in tower.scale_shift_tables:
            table.copy_(torch.tensor([0.0, 0.0, 1.0]).unsqueeze(1).expand_as(table))
        # The mask id was never read before, so it starts as the average token.
        embeddings = tower.denoiser_tower.embeddings.weight
        embeddings[config.mask_token_id] = embeddings.mean(0)
    return tower


@torch.no_grad()
def _init(tower: nn.Module, config: ModelConfig, generator: torch.Generator) -> None:
    """Fan-in scaled normals; weights that write to the residual stream are scaled down by depth; A and dt as in Mamba-2."""
    residual = ("out_proj.weight", "o_proj.weight", "down_proj.weight", "experts.down_proj")
    for name, parameter in tower.named_parameters():
        if name.endswith("embeddings.weight"):
            parameter.normal_(std=0.5, generator=generator)
        elif parameter.dim() >= 2 and "conv1d" not in name:
            std = parameter.shape[-1] ** -0.5
            if name.endswith(residual):
                std /= math.sqrt(config.num_layers)
            if name.endswith(("lm_head.weight", "gate.weight")):
                std *= 0.5
            parameter.normal_(std=std, generator=generator)
    for module in tower.modules():
        if isinstance(module, Mamba2):
            heads = config.mamba_num_heads
            module.A_log.copy_(torch.empty(heads).uniform_(1, 16, generator=generator).log())
            # dt log-uniform in [0.001, 0.1]; dt_bias is the inverse of softplus.
            dt = torch.empty(heads).uniform_(math.log(1e-3), math.log(1e-1), generator=generator).exp()
            module.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))
            module.D.fill_(1.0)
            bound = config.conv_kernel**-0.5
            module.conv1d.weight.uniform_(-bound, bound, generator=generator)
            assert module.conv1d.bias is not None
            module.conv1d.bias.zero_()
        elif isinstance(module, Router):
            module.e_score_correction_bias.zero_()
