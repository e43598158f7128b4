"""The towers' forwards for training: whole batches of texts, all blocks at once, differentiable.

They use the same sub-layers as serving (`tests/train/test_forward.py` compares the two), but the context tower runs
over texts instead of sessions, and the denoiser over every block of every text in one forward, each block seeded with
the frozen context's state at its start.

Letters in shapes: B texts, N positions, P prompt length, n blocks of L positions, C conv channels, K conv kernel.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from twotower.model.context_tower import ContextTower
from twotower.model.denoiser_tower import DenoiserTower
from twotower.model.layers import Attention, Mamba2, Modulation, MoE
from twotower.model.tower import Layer, Tower
from twotower_kernels.experts import relu2
from twotower_kernels.scan import chunk_scan

SCAN_CHUNK = 16
"""Chunk of the scan, unless a block grid requires another; the fastest on a CPU at these sizes."""


@dataclass(slots=True)
class Usage:
    """The number of tokens that went to each expert in a forward: layer -> (experts,) int64."""

    counts: dict[int, Tensor] = field(default_factory=dict)


@dataclass(slots=True)
class BlockSeeds:
    """The context's state at the start of every block."""

    prompt: int
    block: int
    starts: Tensor | None = None
    """(B,) int64: where each row's text begins, after the padding on its left; None: at 0."""
    conv: dict[int, Tensor] = field(default_factory=dict)
    """Mamba layer -> (B, n, K-1, C): the raw columns before each block."""
    ssm: dict[int, Tensor] = field(default_factory=dict)
    """Mamba layer -> (B, n, heads, head_dim, state) fp32."""
    kv: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Attention layer -> K and V (B, kv_heads, N, head_dim)."""


def context_logits(tower: ContextTower, tokens: Tensor, usage: Usage | None = None) -> Tensor:
    """tokens (B, N) int64 -> logits (B, N, vocab) fp32 of the next token at each position."""
    h = _context(tower.context_tower, tokens, None, None, usage)
    return tower.context_lm_head(tower.context_tower.norm_f(h)).float()


@torch.no_grad()
def block_seeds(tower: ContextTower, tokens: Tensor, prompt: int, block: int, starts: Tensor | None = None) -> BlockSeeds:
    """The state at the start of each block of tokens (B, P + n L), where the first starts at P >= 1.

    starts (B,) int64: prompts of different lengths end at the same position; tokens before a row's start have no effect.
    """
    assert 1 <= prompt < tokens.shape[1]
    assert (tokens.shape[1] - prompt) % block == 0
    seeds = BlockSeeds(prompt, block, starts)
    _context(tower.context_tower, tokens, starts, seeds, None)
    return seeds


def block_logits(tower: DenoiserTower, noisy: Tensor, t: Tensor, seeds: BlockSeeds, usage: Usage | None = None) -> Tensor:
    """Logits (B, n, L, vocab) fp32 of all blocks: noisy (B, n, L) int64, t (B, n) fp32 each block's masked share."""
    batch, blocks, length = noisy.shape
    modulations = tower.modulations(t.flatten())
    h = _embed(tower.denoiser_tower, noisy.flatten(0, 1))  # (B n, L, hidden)
    for i, layer in enumerate(tower.denoiser_tower.layers):
        assert isinstance(layer, Layer)
        modulate = _as(modulations[i], h.dtype)
        if isinstance(layer.mixer, Mamba2):
            x = layer.norm(modulate(h))
            x = _mamba_blocks(layer.mixer, x, seeds.conv[i].flatten(0, 1), seeds.ssm[i].flatten(0, 1))
        elif isinstance(layer.mixer, Attention):
            x = layer.norm(modulate(h)).view(batch, blocks * length, -1)
            x = _attention_blocks(layer.mixer, x, *seeds.kv[i], seeds).view_as(h)
        else:
            x = _feed_forward(i, layer.mixer, modulate(layer.norm(h)), usage)
        h = h + modulate.gate * x
    logits = F.linear(tower.denoiser_tower.norm_f(h), tower.lm_head.weight).float()
    return logits.view(batch, blocks, length, -1)


def _context(tower: Tower, tokens: Tensor, starts: Tensor | None, seeds: BlockSeeds | None, usage: Usage | None) -> Tensor:
    real = None if starts is None else torch.arange(tokens.shape[1], device=tokens.device) >= starts.unsqueeze(1)
    mask = None if real is None else _causal(real)
    h = _embed(tower, tokens)
    for i, layer in enumerate(tower.layers):
        assert isinstance(layer, Layer)
        x = layer.norm(h)
        if isinstance(layer.mixer, Mamba2):
            x = _mamba_text(i, layer.mixer, x, real, seeds)
        elif isinstance(layer.mixer, Attention):
            q, k, v = layer.mixer.project(x)
            if seeds is not None:
                seeds.kv[i] = (k, v)
            x = layer.mixer.output(_attend(q, k, v, mask))
        else:
            x = _feed_forward(i, layer.mixer, x, usage)
        h = h + x
    return h


def _on_cpu(tensor: Tensor) -> bool:
    """Whether the tensor is on a CPU, which decides the faster of two forms."""
    return tensor.device.type == "cpu"


def _embed(tower: Tower, tokens: Tensor) -> Tensor:
    """(..., hidden): the residual stream, on a GPU in autocast's dtype, as in serving, for half the memory traffic."""
    h = tower.embeddings(tokens)
    kind = h.device.type
    return h if _on_cpu(h) or not torch.is_autocast_enabled(kind) else h.to(torch.get_autocast_dtype(kind))


def _as(modulation: Modulation, dtype: torch.dtype) -> Modulation:
    return Modulation(modulation.shift.to(dtype), modulation.scale.to(dtype), modulation.gate.to(dtype))


def _causal(real: Tensor) -> Tensor:
    """(B, 1, N, N) from (B, N): real positions see the real ones up to themselves; padding is seen by itself only."""
    n = real.shape[1]
    past = torch.ones(n, n, dtype=torch.bool, device=real.device).tril()
    return ((past & real.unsqueeze(1)) | torch.eye(n, dtype=torch.bool, device=real.device)).unsqueeze(1)


def _mamba_text(i: int, mixer: Mamba2, h: Tensor, real: Tensor | None, seeds: BlockSeeds | None) -> Tensor:
    """h (B, N, hidden); real (B, N) bool: other positions change no state."""
    config, batch = mixer.config, h.shape[0]
    tail = config.conv_kernel - 1
    z, columns, dt = _project(mixer, h)
    if real is not None:
        columns = columns * real.unsqueeze(-1)
    columns = F.pad(columns, (0, 0, tail, 0))  # before the first token all columns are zero
    x, b, c, dt = _convolve(mixer, columns, dt)
    if real is not None:
        dt = dt * real.unsqueeze(-1)  # neither decays nor adds
    a = mixer.decay_rate()
    state = h.new_zeros(batch, config.mamba_num_heads, config.mamba_head_dim, config.ssm_state_size, dtype=torch.float32)
    with torch.autocast(h.device.type, enabled=False):  # the scan is fp32
        if seeds is None:
            y, _, _ = chunk_scan(x, dt, a, b, c, state, SCAN_CHUNK)
        else:
            p = seeds.prompt
            before, state, _ = chunk_scan(x[:, :p], dt[:, :p], a, b[:, :p], c[:, :p], state, SCAN_CHUNK)
            after, _, seeds.ssm[i] = chunk_scan(x[:, p:], dt[:, p:], a, b[:, p:], c[:, p:], state, seeds.block)
            y = torch.cat([before, after], 1)
            starts = torch.arange(p, h.shape[1], seeds.block, device=h.device)
            seeds.conv[i] = columns[:, starts.unsqueeze(1) + torch.arange(tail, device=h.device)]
    return mixer.finish(y, x, z)


def _mamba_blocks(mixer: Mamba2, h: Tensor, conv: Tensor, ssm: Tensor) -> Tensor:
    """h (B n, L, hidden), conv (B n, K-1, C), ssm (B n, heads, head_dim, state)."""
    z, columns, dt = _project(mixer, h)
    x, b, c, dt = _convolve(mixer, torch.cat([conv.to(columns.dtype), columns], 1), dt)
    with torch.autocast(h.device.type, enabled=False):
        y, _, _ = chunk_scan(x, dt, mixer.decay_rate(), b, c, ssm, h.shape[1], need_states=False)
    return mixer.finish(y, x, z)


def _project(mixer: Mamba2, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """z (B, N, d_inner), raw xBC columns (B, N, C), dt (B, N, heads) before softplus."""
    config = mixer.config
    z, columns, dt = mixer.in_proj(h).split([config.d_inner, config.conv_dim, config.mamba_num_heads], dim=-1)
    return z, columns, dt


def _convolve(mixer: Mamba2, columns: Tensor, dt: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """columns (B, K-1 + N, C) -> x (B, N, heads, head_dim), b and c (B, N, groups, state), dt after softplus.

    The depthwise convolution as K shifted products: several times faster on a CPU than conv1d, and forward
    and backward stay in the layout of the projections.
    """
    config = mixer.config
    assert mixer.conv1d.bias is not None
    weight, length = mixer.conv1d.weight.to(columns.dtype), dt.shape[1]
    mixed = mixer.conv1d.bias.to(columns.dtype) + sum(
        columns[:, k : k + length] * weight[:, 0, k] for k in range(config.conv_kernel)
    )
    bc_size = config.n_groups * config.ssm_state_size
    x, b, c = F.silu(mixed).split([config.d_inner, bc_size, bc_size], dim=-1)
    return (
        x.unflatten(-1, (config.mamba_num_heads, config.mamba_head_dim)),
        b.unflatten(-1, (config.n_groups, config.ssm_state_size)),
        c.unflatten(-1, (config.n_groups, config.ssm_state_size)),
        F.softplus(dt.float() + mixer.dt_bias).clamp(*config.time_step_limit),
    )


def _attention_blocks(mixer: Attention, h: Tensor, context_k: Tensor, context_v: Tensor, seeds: BlockSeeds) -> Tensor:
    """h (B, n L, hidden): each position sees the context before its block, and its whole block."""
    q, k, v = mixer.project(h)
    positions = torch.arange(h.shape[1], device=h.device)
    starts = (positions // seeds.block * seeds.block + seeds.prompt).unsqueeze(1)
    places = torch.arange(context_k.shape[2], device=h.device)
    seen = places < starts
    own = positions.unsqueeze(1) // seeds.block == positions // seeds.block
    keys, values = torch.cat([context_k, k], 2), torch.cat([context_v, v], 2)
    mask = torch.cat([seen, own], 1)
    if seeds.starts is not None:
        real = (places >= seeds.starts.unsqueeze(1)).unsqueeze(1)  # (B, 1, N)
        mask = torch.cat([seen & real, own.expand(h.shape[0], -1, -1)], 2).unsqueeze(1)
    return mixer.output(_attend(q, keys, values, mask))


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """q (B, heads, L, d), k and v (B, kv_heads, N, d), mask (L, N) or (B, 1, L, N), or None for causal -> (B, heads, L, d).

    K and V are repeated, and on a CPU converted to fp32, since the backward of grouped or bf16 attention is far slower there.
    """
    repeats = q.shape[1] // k.shape[1]
    if not _on_cpu(q):
        k, v = (x.to(q.dtype).repeat_interleave(repeats, 1) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
    with torch.autocast(q.device.type, enabled=False):
        k, v = (x.float().repeat_interleave(repeats, 1) for x in (k, v))
        return F.scaled_dot_product_attention(q.float(), k, v, attn_mask=mask, is_causal=mask is None)


def _feed_forward(i: int, mixer: nn.Module, h: Tensor, usage: Usage | None) -> Tensor:
    if not isinstance(mixer, MoE):
        return mixer(h)
    flat = h.flatten(0, -2)
    experts, weights = mixer.gate(flat)
    if usage is not None:
        counts = torch.zeros(mixer.gate.weight.shape[0], dtype=torch.int64, device=h.device)
        chosen = experts.flatten()
        usage.counts[i] = counts.scatter_add_(0, chosen, torch.ones_like(chosen))
    compute = _experts if _on_cpu(h) else _wide_experts
    routed = compute(flat, experts, weights, mixer.experts.up_proj, mixer.experts.down_proj)
    return routed.to(h.dtype).view_as(h) + mixer.shared_experts(h)


def _experts(h: Tensor, experts: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """As `twotower_kernels.experts.all_experts`, but each expert works on its own tokens only."""
    order = experts.flatten().argsort(stable=True)
    sizes = experts.flatten().bincount(minlength=up.shape[0]).tolist()
    rows = order // experts.shape[1]
    outs = [
        F.linear(relu2(F.linear(x, u)), d)
        for x, u, d in zip(h[rows].split(sizes), up.unbind(0), down.unbind(0), strict=True)
        if x.shape[0]
    ]
    scaled = torch.cat(outs).float() * weights.flatten()[order].unsqueeze(-1)
    return torch.zeros(h.shape, dtype=torch.float32, device=h.device).index_add(0, rows, scaled)


def _wide_experts(h: Tensor, experts: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """As `_experts`, through all experts in two products: for GPUs, it saves the syncs at the cost of more arithmetic."""
    gates = torch.zeros(h.shape[0], up.shape[0], dtype=weights.dtype, device=h.device).scatter(1, experts, weights)
    mid = relu2(F.linear(h, up.flatten(0, 1))).unflatten(1, up.shape[:2])
    mid = mid * gates.to(mid.dtype).unsqueeze(-1)
    return F.linear(mid.flatten(1), down.permute(1, 0, 2).flatten(1))
