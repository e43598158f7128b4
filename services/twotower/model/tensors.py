"""Names and shapes of every tensor of a checkpoint, tower by tower (docs/model.md, Checkpoint). No torch here."""

from __future__ import annotations

import re
from collections.abc import Iterator

from twotower.model.config import ATTENTION, MAMBA, MLP, MOE, TIME_EMBEDDING_SIZE, ModelConfig

CONTEXT_PREFIXES = ("context_tower.", "context_lm_head.")
DENOISER_PREFIXES = ("denoiser_tower.", "lm_head.", "t_embedder.", "t_block.", "scale_shift_tables.")

Shapes = Iterator[tuple[str, tuple[int, ...]]]

EXPERT_PARTS = {
    "fp8": {"weight": "F8_E4M3", "weight_scale": "F32"},
    "fp4": {"weight": "U8", "weight_scale": "F8_E4M3", "weight_scale_2": "F32"},
}
"""What a quantized expert's matrix is stored as: the last part of each tensor's name, and its dtype as safetensors names it.
In the order of `twotower_kernels.quant.Packed.tensors`, which defines layout and meaning."""

_FLOATS = ("F32", "BF16")
_EXPERT_PART = re.compile(r"\.experts\.\d+\.(?:up_proj|down_proj)\.(\w+)$")


def context_tensors(config: ModelConfig) -> Shapes:
    """(name, shape) of all that a context process reads."""
    yield from _tower(config, "context_tower.", config.context_experts)
    yield "context_lm_head.weight", (config.vocab_size, config.hidden_size)


def denoiser_tensors(config: ModelConfig) -> Shapes:
    """(name, shape) of all that a denoiser process reads."""
    hidden = config.hidden_size
    yield from _tower(config, "denoiser_tower.", config.denoiser_experts)
    yield "lm_head.weight", (config.vocab_size, hidden)
    yield "t_embedder.mlp.0.weight", (hidden, TIME_EMBEDDING_SIZE)
    yield "t_embedder.mlp.0.bias", (hidden,)
    yield "t_embedder.mlp.2.weight", (hidden, hidden)
    yield "t_embedder.mlp.2.bias", (hidden,)
    yield "t_block.1.weight", (3 * hidden, hidden)
    yield "t_block.1.bias", (3 * hidden,)
    for i in range(config.num_layers):
        yield f"scale_shift_tables.{i}", (3, hidden)


def stored_dtypes(config: ModelConfig, name: str) -> tuple[str, ...]:
    """What a tensor may be stored as, as safetensors names it."""
    experts = config.context_experts if name.startswith(CONTEXT_PREFIXES) else config.denoiser_experts
    part = _EXPERT_PART.search(name)
    return _FLOATS if part is None or experts == "bf16" else (EXPERT_PARTS[experts][part[1]],)


def _tower(config: ModelConfig, prefix: str, experts: str) -> Shapes:
    yield f"{prefix}embeddings.weight", (config.vocab_size, config.hidden_size)
    for i, kind in enumerate(config.hybrid_override_pattern):
        yield f"{prefix}layers.{i}.norm.weight", (config.hidden_size,)
        for name, shape in _moe(config, experts) if kind == MOE else _MIXERS[kind](config):
            yield f"{prefix}layers.{i}.mixer.{name}", shape
    yield f"{prefix}norm_f.weight", (config.hidden_size,)


def _mamba(config: ModelConfig) -> Shapes:
    heads, conv = config.mamba_num_heads, config.conv_dim
    yield "in_proj.weight", (config.d_inner + conv + heads, config.hidden_size)
    yield "conv1d.weight", (conv, 1, config.conv_kernel)
    yield "conv1d.bias", (conv,)
    yield "A_log", (heads,)
    yield "D", (heads,)
    yield "dt_bias", (heads,)
    yield "norm.weight", (config.d_inner,)
    yield "out_proj.weight", (config.hidden_size, config.d_inner)


def _attention(config: ModelConfig) -> Shapes:
    queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    yield "q_proj.weight", (queries, config.hidden_size)
    yield "k_proj.weight", (keys, config.hidden_size)
    yield "v_proj.weight", (keys, config.hidden_size)
    yield "o_proj.weight", (config.hidden_size, queries)


def _moe(config: ModelConfig, experts: str) -> Shapes:
    yield "gate.weight", (config.n_routed_experts, config.hidden_size)
    yield "gate.e_score_correction_bias", (config.n_routed_experts,)
    for e in range(config.n_routed_experts):
        for name, shape in _mlp_of(config.hidden_size, config.moe_intermediate_size):
            for part, stored in _expert(shape, experts):
                yield f"experts.{e}.{name}{part}", stored
    for name, shape in _mlp_of(config.hidden_size, config.moe_shared_expert_intermediate_size):
        yield f"shared_experts.{name}", shape


def _expert(shape: tuple[int, int], experts: str) -> Shapes:
    """What an expert's matrix is stored as: the end of each name behind ``weight``, and its shape."""
    outputs, inputs = shape
    groups = -(-inputs // 16)
    yield "", (outputs, 8 * groups) if experts == "fp4" else shape
    if experts == "fp8":
        yield "_scale", (outputs,)
    elif experts == "fp4":
        yield "_scale", (outputs, groups)
        yield "_scale_2", ()


def _mlp(config: ModelConfig) -> Shapes:
    yield from _mlp_of(config.hidden_size, config.intermediate_size)


def _mlp_of(hidden: int, width: int) -> Iterator[tuple[str, tuple[int, int]]]:
    yield "up_proj.weight", (width, hidden)
    yield "down_proj.weight", (hidden, width)


_MIXERS = {MAMBA: _mamba, ATTENTION: _attention, MLP: _mlp}
