"""The layers both towers are made of: norms, embeddings of time, and the four mixers.

Parameter names are the checkpoint's, so that loading is a copy. Weights are in the model's dtype, but what
is small and sensitive (norms, A_log, D, dt_bias, router) is kept in fp32 or fp64, whatever the checkpoint holds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from twotower.model.config import TIME_EMBEDDING_SIZE, ModelConfig
from twotower.model.packed import PackedExperts
from twotower_kernels.block import ScanFactors, ScanWeights, finish
from twotower_kernels.experts import wide_down
from twotower_kernels.kernels import TORCH, Kernels
from twotower_kernels.norms import Order
from twotower_kernels.prefill import Segments


class Linear(nn.Linear):
    """A projection, and what goes with it (`twotower_kernels.linear`)."""

    kernels = TORCH

    def forward(self, x: Tensor, *, add: Tensor | None = None, relu2: bool = False, wide: bool = False) -> Tensor:
        """(..., n_in) -> (..., n_out)."""
        return self.kernels.linear(x, self.weight, self.bias, add=add, relu2=relu2, wide=wide)


def linear(n_in: int, n_out: int, *, bias: bool = False) -> Linear:
    """A projection without the default initialisation, which loading would only overwrite."""
    return nn.utils.skip_init(Linear, n_in, n_out, bias=bias)


def use_kernels(tower: nn.Module, kernels: Kernels) -> None:
    """From now on this tower computes by these."""
    for module in tower.modules():
        if hasattr(module, "kernels"):
            vars(module)["kernels"] = kernels  # in place of its class's


class RMSNorm(nn.Module):
    """Root mean square norm in fp32, weight applied in fp32, cast back."""

    kernels = TORCH

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size, dtype=torch.float32))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(..., size) -> (..., size)."""
        return self.kernels.modulated_norm(x, self.weight, self.eps, order="norm_first")

    def modulated(self, h: Tensor, modulation: Modulation | None, order: Order) -> Tensor:
        """Norm and modulation of h (B, L, size), in this order."""
        shift, scale = (None, None) if modulation is None else (modulation.shift, modulation.scale)
        return self.kernels.modulated_norm(h, self.weight, self.eps, shift, scale, order=order)

    def after(
        self, h: Tensor, x: Tensor, gate: Tensor | None, modulation: Modulation | None, order: Order
    ) -> tuple[Tensor, Tensor]:
        """The residual h + gate x (B, L, size) of the layer before, and `modulated` of it."""
        shift, scale = (None, None) if modulation is None else (modulation.shift, modulation.scale)
        return self.kernels.add_modulated_norm(h, x, gate, self.weight, self.eps, shift, scale, order=order)


class GroupNormWeight(nn.Module):
    """The weight of the norm after the scan (`twotower_kernels.block.finish`)."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size, dtype=torch.float32))


class Mamba2(nn.Module):
    """Mamba-2 mixer over L positions, from a seed: the conv tail and S of the positions before them."""

    kernels = TORCH

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        heads = config.mamba_num_heads
        self.in_proj = linear(config.hidden_size, config.d_inner + config.conv_dim + heads)
        self.conv1d = nn.utils.skip_init(
            nn.Conv1d, config.conv_dim, config.conv_dim, config.conv_kernel, groups=config.conv_dim
        )
        self.A_log = nn.Parameter(torch.zeros(heads, dtype=torch.float32))
        self.D = nn.Parameter(torch.ones(heads, dtype=torch.float32))
        self.dt_bias = nn.Parameter(torch.zeros(heads, dtype=torch.float32))
        self.norm = GroupNormWeight(config.d_inner)
        self.out_proj = linear(config.d_inner, config.hidden_size)
        self._prepared: ScanWeights | None = None

    def prepare(self) -> None:
        """Derive what the scan needs from the loaded weights; they must not change afterwards."""
        self._prepared = self.scan_weights()

    def decay_rate(self) -> Tensor:
        """A (heads,), fp32, negative."""
        return -self.A_log.float().exp()

    def scan_weights(self) -> ScanWeights:
        """All weights between the projections."""
        return self._prepared or ScanWeights(
            conv_weight=self.conv1d.weight,
            conv_bias=self.conv1d.bias,
            dt_bias=self.dt_bias,
            a=self.decay_rate(),
            d=self.D,
            norm=self.norm.weight,
            groups=self.config.n_groups,
            eps=self.config.layer_norm_epsilon,
            time_step_limit=self.config.time_step_limit,
        )

    def forward(self, h: Tensor, conv_tail: Tensor, ssm: Tensor, slots: Tensor | None = None) -> Tensor:
        """A block from a seed that is not changed: h (B, L, hidden) -> alike.

        conv_tail (B, conv_dim, K), ssm (B, heads, head_dim, state) fp32; with slots (B,) int64, of a pool's slots.
        """
        return self.out_proj(self.kernels.block_scan(self.in_proj(h), conv_tail, ssm, self.scan_weights(), slots=slots))

    def commit(self, h: Tensor, conv_tail: Tensor, ssm: Tensor, slots: Tensor | None = None) -> tuple[Tensor, ScanFactors]:
        """As `forward`, and the seed is taken past the block, in place; returns the factors of that, too."""
        y, factors = self.kernels.block_scan_commit(self.in_proj(h), conv_tail, ssm, self.scan_weights(), slots=slots)
        return self.out_proj(y), factors

    def verify(
        self, h: Tensor, conv_tail: Tensor, ssm: Tensor, slots: Tensor | None = None
    ) -> tuple[Tensor, ScanFactors, Tensor]:
        """As `commit`, but the seed stays. Returns the raw xBC (B, L, conv_dim), too, from which any tail can be made."""
        projected = self.in_proj(h)
        y, factors = self.kernels.block_scan_factors(projected, conv_tail, ssm, self.scan_weights(), slots=slots)
        return self.out_proj(y), factors, projected.narrow(-1, self.config.d_inner, self.config.conv_dim)

    def prefill(self, h: Tensor, segments: Segments, conv_tail: Tensor, ssm: Tensor, slots: Tensor | None = None) -> Tensor:
        """As `commit`, over chunks of prompts, one behind the other in h (1, N, hidden), and without the factors."""
        y = self.kernels.prefill_scan(
            self.in_proj(h)[0], segments, conv_tail, ssm, self.scan_weights(), chunk=self.config.chunk_size, slots=slots
        )
        return self.out_proj(y.unsqueeze(0))

    def finish(self, y: Tensor, x: Tensor, z: Tensor) -> Tensor:
        """Scan output y (B, L, heads, head_dim) fp32, x alike, z (B, L, d_inner) -> (B, L, hidden)."""
        return self.out_proj(finish(y, x, z, self.scan_weights()))


class Attention(nn.Module):
    """Grouped-query attention without any position encoding."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = linear(config.hidden_size, queries)
        self.k_proj = linear(config.hidden_size, keys)
        self.v_proj = linear(config.hidden_size, keys)
        self.o_proj = linear(queries, config.hidden_size)

    def project(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """h (B, L, hidden) -> q (B, heads, L, head_dim), k and v (B, kv_heads, L, head_dim)."""
        d = self.config.head_dim
        q, k, v = (p(h).unflatten(-1, (-1, d)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        return q, k, v

    def output(self, attended: Tensor) -> Tensor:
        """(B, heads, L, d) -> (B, L, hidden)."""
        return self.o_proj(attended.transpose(1, 2).flatten(-2))


class MLP(nn.Module):
    """down(relu2(up(x)))."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.up_proj = linear(hidden, width)
        self.down_proj = linear(width, hidden)

    def forward(self, h: Tensor, add: Tensor | None = None) -> Tensor:
        """(..., hidden) -> (..., hidden); add (..., hidden) fp32 is added to it."""
        return self.down_proj(self.up_proj(h, relu2=True), add=add)


class Router(nn.Module):
    """Chooses experts; logits in fp64."""

    kernels = TORCH

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        self.e_score_correction_bias = nn.Parameter(
            torch.zeros(config.n_routed_experts, dtype=torch.float32), requires_grad=False
        )

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """h (N, hidden) -> experts (N, k) int64, weights (N, k) fp32."""
        config = self.config
        return self.kernels.route(
            h,
            self.weight,
            self.e_score_correction_bias,
            top_k=config.num_experts_per_tok,
            groups=config.n_group,
            top_groups=config.topk_group,
            normalize=config.norm_topk_prob,
            scale=config.routed_scaling_factor,
        )


class Experts(nn.Module):
    """The routed experts, stacked: up_proj (E, I, hidden), down_proj (E, hidden, I)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        experts, width, hidden = config.n_routed_experts, config.moe_intermediate_size, config.hidden_size
        self.up_proj = nn.Parameter(torch.empty(experts, width, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, width))


class MoE(nn.Module):
    """Routed experts and the fused shared expert."""

    kernels = TORCH

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = Router(config)
        self.experts = Experts(config)
        self.shared_experts = MLP(config.hidden_size, config.moe_shared_expert_intermediate_size)
        self._top_k = config.num_experts_per_tok
        self._wide: Tensor | None = None
        self.packed: PackedExperts | None = None
        """In place of `experts` where a kernel computes with quantized weights as they are stored."""

    def pack(self, packed: PackedExperts) -> None:
        """From now on compute with these; the layer's own experts are dropped."""
        self.packed = packed
        del self.experts

    def prepare(self) -> None:
        """Lay the loaded weights out for the fastest form; they must not change afterwards."""
        if self.packed is None:
            self._wide = wide_down(self.experts.down_proj, self._top_k)

    def forward(self, h: Tensor) -> Tensor:
        """(B, L, hidden) -> (B, L, hidden)."""
        flat = h.flatten(0, -2)
        experts, weights = self.gate(flat)
        if self.packed is not None:
            routed = self.packed(flat, experts, weights)
        else:
            routed = self.kernels.run_experts(flat, experts, weights, self.experts.up_proj, self.experts.down_proj, self._wide)
        return self.shared_experts(h, routed.view_as(h))


class TimestepEmbedder(nn.Module):
    """t in [0, 1] -> (hidden,): sinusoid of 1000 t (cos half first), Linear, SiLU, Linear."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(linear(TIME_EMBEDDING_SIZE, hidden, bias=True), nn.SiLU(), linear(hidden, hidden, bias=True))
        half = TIME_EMBEDDING_SIZE // 2
        # Computed, not stored: real even where the module is built on the meta device to be loaded.
        freqs = torch.exp(-math.log(10000) / half * torch.arange(half, device="cpu"))
        self.register_buffer("freqs", freqs, persistent=False)

    @property
    def dtype(self) -> torch.dtype:
        """The model's dtype."""
        return next(self.mlp.parameters()).dtype

    def forward(self, t: Tensor) -> Tensor:
        """t (B,) fp32 -> (B, hidden) in the model's dtype. t is rounded to that dtype first, as in training."""
        dtype = self.dtype
        assert isinstance(self.freqs, Tensor)
        angles = 1000.0 * t.to(dtype).float().unsqueeze(-1) * self.freqs.float()
        return self.mlp(torch.cat([angles.cos(), angles.sin()], -1).to(dtype))


@dataclass(slots=True)
class Modulation:
    """Shift, scale and gate of one layer, each (B, 1, hidden)."""

    shift: Tensor
    scale: Tensor
    gate: Tensor

    def __call__(self, h: Tensor) -> Tensor:
        """h (B, L, hidden) -> h (1 + scale) + shift."""
        return h * (1 + self.scale) + self.shift
