"""The architecture of a checkpoint, from its `config.json`. No torch here."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from twotower.errors import CheckpointError

MAMBA, ATTENTION, MOE, MLP = "M", "*", "E", "-"
LAYER_KINDS = (MAMBA, ATTENTION, MOE, MLP)

TIME_EMBEDDING_SIZE = 256
"""Width of the sinusoid of 1000·t that conditions the denoiser (docs/model.md, Denoiser tower)."""

PRECISIONS = ("bf16", "fp8", "fp4")
"""How routed experts can be stored: like all other weights, or quantized (`twotower_kernels.quant`)."""

TRAINED_BLOCK_SIZE = 16
"""Block size of the published checkpoints, whose config.json does not state it."""


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Widths and counts, named as in the published `config.json`. Both towers share them."""

    vocab_size: int
    hidden_size: int
    hybrid_override_pattern: str
    """One letter a layer: M (Mamba-2), * (attention), E (mixture of experts), - (dense MLP)."""
    # Attention.
    num_attention_heads: int = 1
    num_key_value_heads: int = 1
    head_dim: int = 1
    # Mamba-2.
    mamba_num_heads: int = 1
    mamba_head_dim: int = 1
    ssm_state_size: int = 1
    n_groups: int = 1
    conv_kernel: int = 4
    chunk_size: int = 128
    time_step_limit: tuple[float, float] = (0.0, math.inf)
    # MoE and dense MLP.
    intermediate_size: int = 1
    n_routed_experts: int = 1
    num_experts_per_tok: int = 1
    moe_intermediate_size: int = 1
    moe_shared_expert_intermediate_size: int = 1
    routed_scaling_factor: float = 1.0
    norm_topk_prob: bool = True
    n_group: int = 1
    topk_group: int = 1
    # The rest.
    layer_norm_epsilon: float = 1e-5
    torch_dtype: str = "bfloat16"
    max_position_embeddings: int = 262144
    """Tokens of prompt and completion together; there is no position encoding, so memory is the real bound."""
    eos_token_id: int | tuple[int, ...] = 2
    mask_token_id: int = 3
    block_size: int = TRAINED_BLOCK_SIZE
    # Written by `twotower quantize`: how each tower's routed experts are stored, one of PRECISIONS.
    context_experts: str = "bf16"
    denoiser_experts: str = "bf16"

    @classmethod
    def from_file(cls, path: Path) -> ModelConfig:
        """Read `config.json`, which may hold `Infinity`. Raises CheckpointError."""
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise CheckpointError(f"{path} does not exist") from None
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from None
        if not isinstance(raw, dict):
            raise CheckpointError(f"{path} holds no JSON object")
        try:
            return cls.from_dict(raw)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from None

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> ModelConfig:
        """Take the known keys of a `config.json`; check them. Raises CheckpointError."""
        _refuse_other_models(raw)
        raw = {"torch_dtype": raw.get("dtype"), **raw}
        values: dict[str, Any] = {}
        for field in dataclasses.fields(cls):
            value = raw.get(field.name)
            if value is not None:
                values[field.name] = _convert(field.name, str(field.type), value)
            elif field.default is dataclasses.MISSING:
                raise CheckpointError(f"{field.name} is missing")
        config = cls(**values)
        config._check(raw)
        return config

    def _check(self, raw: dict[str, Any]) -> None:
        pattern = self.hybrid_override_pattern
        if not pattern or set(pattern) - set(LAYER_KINDS):
            raise CheckpointError(f"hybrid_override_pattern must be made of {' '.join(LAYER_KINDS)}, not {pattern!r}")
        if raw.get("num_hidden_layers", len(pattern)) != len(pattern):
            raise CheckpointError(f"num_hidden_layers is {raw['num_hidden_layers']}, but the pattern has {len(pattern)} layers")
        for kind, needed in _NEEDED_BY_KIND.items():
            for name in needed if kind in pattern else ():
                if raw.get(name) is None:
                    raise CheckpointError(f"{name} is missing, and the pattern has {kind!r} layers")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type == "int" and value < (0 if field.name.endswith("_id") else 1):
                raise CheckpointError(f"{field.name} must be positive, not {value}")
        for whole, part in _DIVISIBLE:
            if getattr(self, whole) % getattr(self, part):
                raise CheckpointError(f"{whole} {getattr(self, whole)} is no multiple of {part} {getattr(self, part)}")
        if self.num_experts_per_tok > self.n_routed_experts:
            raise CheckpointError(
                f"num_experts_per_tok {self.num_experts_per_tok} exceeds n_routed_experts {self.n_routed_experts}"
            )
        if self.topk_group > self.n_group:
            raise CheckpointError(f"topk_group {self.topk_group} exceeds n_group {self.n_group}")
        for name, token in (("mask_token_id", self.mask_token_id), *(("eos_token_id", t) for t in self.eos_token_ids)):
            if not 0 <= token < self.vocab_size:
                raise CheckpointError(f"{name} {token} is outside the vocabulary of {self.vocab_size}")
        for name in ("context_experts", "denoiser_experts"):
            if getattr(self, name) not in PRECISIONS:
                raise CheckpointError(f"{name} must be {', '.join(PRECISIONS)}, not {getattr(self, name)!r}")
        if self.torch_dtype not in ("float32", "bfloat16"):
            raise CheckpointError(f"torch_dtype must be float32 or bfloat16, not {self.torch_dtype!r}")

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """End-of-sequence ids."""
        return (self.eos_token_id,) if isinstance(self.eos_token_id, int) else self.eos_token_id

    @property
    def num_layers(self) -> int:
        """Layers of a tower."""
        return len(self.hybrid_override_pattern)

    def layers_of(self, kind: str) -> tuple[int, ...]:
        """Indices of the layers of one kind."""
        return tuple(i for i, k in enumerate(self.hybrid_override_pattern) if k == kind)

    @property
    def d_inner(self) -> int:
        """Width of a Mamba mixer: heads x head_dim."""
        return self.mamba_num_heads * self.mamba_head_dim

    @property
    def conv_dim(self) -> int:
        """Channels of the causal convolution: x, B and C together."""
        return self.d_inner + 2 * self.n_groups * self.ssm_state_size


_NEEDED_BY_KIND = {
    MAMBA: ("mamba_num_heads", "mamba_head_dim", "ssm_state_size", "n_groups", "conv_kernel"),
    ATTENTION: ("num_attention_heads", "num_key_value_heads", "head_dim"),
    MOE: ("n_routed_experts", "num_experts_per_tok", "moe_intermediate_size", "moe_shared_expert_intermediate_size"),
    MLP: ("intermediate_size",),
}

_DIVISIBLE = (
    ("num_attention_heads", "num_key_value_heads"),
    ("mamba_num_heads", "n_groups"),
    ("n_routed_experts", "n_group"),
)

_FIXED: dict[str, tuple[Any, ...]] = {
    "mlp_hidden_act": ("relu2",),
    "mamba_hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "use_bias": (False,),
    "mamba_proj_bias": (False,),
    "use_conv_bias": (True,),
    "residual_in_fp32": (False,),
    "n_shared_experts": (1,),
}


def _refuse_other_models(raw: dict[str, Any]) -> None:
    """The published family fixes these; a checkpoint that differs would be computed wrongly."""
    for name, allowed in _FIXED.items():
        if name in raw and raw[name] not in allowed:
            raise CheckpointError(f"{name} {raw[name]!r} is not supported, only {allowed[0]!r}")


def _convert(name: str, kind: str, value: Any) -> Any:
    """A JSON value as the field's type; booleans and fractions are no integers."""
    is_int = isinstance(value, int) and not isinstance(value, bool)
    if kind == "int" and is_int:
        return value
    if kind == "float" and (is_int or isinstance(value, float)):
        return float(value)
    if (kind == "str" and isinstance(value, str)) or (kind == "bool" and isinstance(value, bool)):
        return value
    if name == "eos_token_id" and is_int:
        return value
    if name == "eos_token_id" and isinstance(value, list) and all(isinstance(v, int) for v in value):
        return tuple(value)
    if name == "time_step_limit" and isinstance(value, list | tuple) and len(value) == 2:
        return (float(value[0]), float(value[1]))
    raise CheckpointError(f"{name} must be of type {kind}, not {value!r}")
