"""Names and shapes of every tensor of a checkpoint, tower by tower (model.md, Checkpoint). No torch here."""

from __future__ import annotations

from collections.abc import Iterator

from twotower.model.config import ATTENTION, MAMBA, MLP, MOE, TIME_EMBEDDING_SIZE, ModelConfig

CONTEXT_PREFIXES = ("context_tower.", "context_lm_head.")
DENOISER_PREFIXES = ("denoiser_tower.", "lm_head.", "t_embedder.", "t_block.", "scale_shift_tables.")

Shapes = Iterator[tuple[str, tuple[int, ...]]]


def context_tensors(config: ModelConfig) -> Shapes:
    """(name, shape) of all that a context process reads."""
    yield from _tower(config, "context_tower.")
    yield "context_lm_head.weight", (config.vocab_size, config.hidden_size)


def denoiser_tensors(config: ModelConfig) -> Shapes:
    """(name, shape) of all that a denoiser process reads."""
    hidden = config.hidden_size
    yield from _tower(config, "denoiser_tower.")
    yield "lm_head.weight", (config.vocab_size, hidden)
    yield "t_embedder.mlp.0.weight", (hidden, TIME_EMBEDDING_SIZE)
    yield "t_embedder.mlp.0.bias", (hidden,)
    yield "t_embedder.mlp.2.weight", (hidden, hidden)
    yield "t_embedder.mlp.2.bias", (hidden,)
    yield "t_block.1.weight", (3 * hidden, hidden)
    yield "t_block.1.bias", (3 * hidden,)
    for i in range(config.num_layers):
        yield f"scale_shift_tables.{i}", (3, hidden)


def _tower(config: ModelConfig, prefix: str) -> Shapes:
    yield f"{prefix}embeddings.weight", (config.vocab_size, config.hidden_size)
    for i, kind in enumerate(config.hybrid_override_pattern):
        yield f"{prefix}layers.{i}.norm.weight", (config.hidden_size,)
        for name, shape in _MIXERS[kind](config):
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


def _moe(config: ModelConfig) -> Shapes:
    yield "gate.weight", (config.n_routed_experts, config.hidden_size)
    yield "gate.e_score_correction_bias", (config.n_routed_experts,)
    for e in range(config.n_routed_experts):
        for name, shape in _mlp_of(config.hidden_size, config.moe_intermediate_size):
            yield f"experts.{e}.{name}", shape
    for name, shape in _mlp_of(config.hidden_size, config.moe_shared_expert_intermediate_size):
        yield f"shared_experts.{name}", shape


def _mlp(config: ModelConfig) -> Shapes:
    yield from _mlp_of(config.hidden_size, config.intermediate_size)


def _mlp_of(hidden: int, width: int) -> Shapes:
    yield "up_proj.weight", (width, hidden)
    yield "down_proj.weight", (hidden, width)


_MIXERS = {MAMBA: _mamba, ATTENTION: _attention, MOE: _moe, MLP: _mlp}
