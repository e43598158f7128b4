"""The layers both towers are made of: norms, embeddings of time, and the four mixers.

Parameter names are the checkpoint's, so that loading is a copy. Weights are in the model's dtype, but what
is small and sensitive (norms, A_log, D, dt_bias, router) is kept in fp32 or fp64, whatever the checkpoint holds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from twotower.model.config import TIME_EMBEDDING_SIZE, ModelConfig
from twotower.model.packed import PackedExperts
from twotower_kernels import linear as kernels
from twotower_kernels.conv import causal_conv
from twotower_kernels.experts import relu2, route, run_experts, wide_down
from twotower_kernels.scan import chunk_scan


class Linear(nn.Linear):
    """A projection, by the form for the case."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., n_in) -> (..., n_out)."""
        return kernels.linear(x, self.weight, self.bias)


def linear(n_in: int, n_out: int, *, bias: bool = False) -> Linear:
    """A projection without the default initialisation, which loading would only overwrite."""
    return nn.utils.skip_init(Linear, n_in, n_out, bias=bias)


class RMSNorm(nn.Module):
    """Root mean square norm in fp32, weight applied in fp32, cast back."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size, dtype=torch.float32))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(..., size) -> (..., size)."""
        return F.rms_norm(x.float(), self.weight.shape, self.weight, self.eps).to(x.dtype)


class GatedGroupNorm(nn.Module):
    """``rmsnorm_groups(y * silu(z)) * weight`` in fp32: the gate comes before the norm."""

    def __init__(self, size: int, groups: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size, dtype=torch.float32))
        self.groups = groups
        self.eps = eps

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        """y and z (..., size); returns z's dtype."""
        gated = (y.float() * F.silu(z.float())).unflatten(-1, (self.groups, -1))
        normed = F.rms_norm(gated, gated.shape[-1:], None, self.eps).flatten(-2)
        return (normed * self.weight).to(z.dtype)


@dataclass(slots=True)
class MambaFactors:
    """What a commit changes in one Mamba layer: enough to apply the same update elsewhere."""

    x: Tensor
    """(B, L, heads, head_dim), model dtype."""
    b: Tensor
    """(B, L, groups, state), model dtype."""
    dt: Tensor
    """(B, L, heads) fp32, after softplus and clamp."""
    conv: Tensor
    """(B, conv_dim, K): the new tail of raw xBC columns, newest last."""


class Mamba2(nn.Module):
    """Mamba-2 mixer over L positions, from a seed: the conv tail and S of the positions before them."""

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
        self.norm = GatedGroupNorm(config.d_inner, config.n_groups, config.layer_norm_epsilon)
        self.out_proj = linear(config.d_inner, config.hidden_size)

    def decay_rate(self) -> Tensor:
        """A (heads,), fp32, negative."""
        return -self.A_log.float().exp()

    def project(self, h: Tensor, conv_tail: Tensor) -> tuple[Tensor, MambaFactors, Tensor]:
        """h (B, L, hidden), conv_tail (B, conv_dim, K) -> z (B, L, d_inner), factors, c (B, L, groups, state)."""
        config = self.config
        z, xbc, dt = self.in_proj(h).split([config.d_inner, config.conv_dim, config.mamba_num_heads], dim=-1)
        columns = torch.cat([conv_tail.to(xbc.dtype).transpose(1, 2), xbc], dim=1)  # (B, K + L, conv_dim)
        mixed = F.silu(causal_conv(columns[:, 1:], self.conv1d.weight, self.conv1d.bias))
        bc_size = config.n_groups * config.ssm_state_size
        x, b, c = mixed.split([config.d_inner, bc_size, bc_size], dim=-1)
        dt = F.softplus(dt.float() + self.dt_bias).clamp(*config.time_step_limit)
        factors = MambaFactors(
            x=x.unflatten(-1, (config.mamba_num_heads, config.mamba_head_dim)),
            b=b.unflatten(-1, (config.n_groups, config.ssm_state_size)),
            dt=dt,
            conv=columns[:, -config.conv_kernel :].transpose(1, 2),
        )
        return z, factors, c.unflatten(-1, (config.n_groups, config.ssm_state_size))

    def finish(self, y: Tensor, x: Tensor, z: Tensor) -> Tensor:
        """Scan output y (B, L, heads, head_dim) fp32, x alike, z (B, L, d_inner) -> (B, L, hidden)."""
        y = y + self.D.float().unsqueeze(-1) * x.float()
        return self.out_proj(self.norm(y.flatten(-2), z))

    def forward(
        self, h: Tensor, conv_tail: Tensor, ssm: Tensor, *, chunk: int, need_states: bool
    ) -> tuple[Tensor, MambaFactors, Tensor, Tensor]:
        """h (B, L, hidden), conv_tail (B, conv_dim, K), ssm (B, heads, head_dim, state) fp32; neither is changed.

        Returns the output (B, L, hidden), the factors, the final state and the states at the chunks' starts.
        """
        z, f, c = self.project(h, conv_tail)
        y, final, starts = chunk_scan(f.x, f.dt, self.decay_rate(), f.b, c, ssm, chunk, need_states=need_states)
        return self.finish(y, f.x, z), f, final, starts


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

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """q (B, heads, L, d), k and v (B, kv_heads, N, d), mask (L, N) or (B, 1, L, N) True where seen -> (B, heads, L, d).

        Without a mask, every query sees every key, and the queries of one KV head are one matrix.
        """
        if mask is not None:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        batch, heads, length, d = q.shape
        out = F.scaled_dot_product_attention(q.reshape(batch, k.shape[1], -1, d), k, v)
        return out.view(batch, heads, length, d)

    def output(self, attended: Tensor) -> Tensor:
        """(B, heads, L, d) -> (B, L, hidden)."""
        return self.o_proj(attended.transpose(1, 2).flatten(-2))


class MLP(nn.Module):
    """down(relu2(up(x)))."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.up_proj = linear(hidden, width)
        self.down_proj = linear(width, hidden)

    def forward(self, h: Tensor) -> Tensor:
        """(..., hidden) -> (..., hidden)."""
        return self.down_proj(relu2(self.up_proj(h)))


class Router(nn.Module):
    """Chooses experts; logits in fp64."""

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
        return route(
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
            routed = run_experts(flat, experts, weights, self.experts.up_proj, self.experts.down_proj, self._wide)
        return routed.to(h.dtype).view_as(h) + self.shared_experts(h)


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
