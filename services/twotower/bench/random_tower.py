"""Towers of any size with random weights, made on their device. They serve for timing, which does not depend on the weights."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

from twotower.bench.clock import free_bytes
from twotower.errors import ConfigError
from twotower.model.config import ModelConfig
from twotower.model.context_tower import ContextTower
from twotower.model.denoiser_tower import DenoiserTower
from twotower.model.experts import as_format
from twotower.model.layers import Mamba2, MoE, use_kernels
from twotower.model.packed import PackedExperts
from twotower.model.pool import PoolSize, StatePool, pages_for
from twotower.model.state import ContextState
from twotower.model.tower import Layer, Tower
from twotower.model.weights import loaded_dtype, set_parameter
from twotower_kernels.backend import load, resolve
from twotower_kernels.quant import Packed, quantize

MEMORY_SHARE = 0.8
"""The share of free memory that may be used; the rest is for activations."""

T = TypeVar("T", bound=ContextTower | DenoiserTower)


def random_tower(
    kind: type[T], config: ModelConfig, dtype: torch.dtype, device: torch.device, experts: str = "bf16"
) -> tuple[T, bool]:
    """A tower, and whether layers of one kind share their weights, which they do if memory cannot hold all of them.

    A layer at the real size is larger than any GPU's cache, so that each reads its weights from memory, shared or not.
    experts: bf16, or fp8 or fp4 if a kernel reads them packed. Raises ConfigError if it is too large or has no such kernel.
    """
    with torch.device("meta"):
        tower = kind(config)
    backbone = tower.context_tower if isinstance(tower, ContextTower) else tower.denoiser_tower
    free = MEMORY_SHARE * free_bytes(device)
    shared = _bytes(tower, dtype) > free
    if shared:
        _share(backbone)
        if (needed := _bytes(tower, dtype)) > free:
            raise ConfigError(f"size: one layer of each kind takes {needed / 1e9:.1f} GB, and {free / 1e9:.1f} are free")
    generator = torch.Generator(device).manual_seed(0)
    if experts != "bf16":
        _pack(tower, config, device, experts, generator)
    for name, parameter in list(tower.named_parameters()):
        set_parameter(tower, name, _random(name, parameter, loaded_dtype(name, dtype), device, generator))
    tower.to(device).requires_grad_(False).eval()
    for module in tower.modules():
        if isinstance(module, MoE | Mamba2):
            module.prepare()
    use_kernels(tower, load(resolve("auto", device)))
    return tower, shared


def random_states(
    config: ModelConfig, dtype: torch.dtype, device: torch.device, batch: int, context: int
) -> list[ContextState] | None:
    """States of `batch` sessions after `context` tokens, with room for a block; None if memory cannot hold them."""
    room = context + config.block_size
    size = PoolSize(batch, batch * pages_for(room))
    pool_bytes = _pool_bytes(config, dtype, size)
    logits = 3 * 4 * batch * config.block_size * config.vocab_size
    if pool_bytes + logits > MEMORY_SHARE * free_bytes(device):
        return None
    pool = StatePool(config, dtype, device, size)
    states = [pool.acquire(room) for _ in range(batch)]
    for tensors in (pool.conv, pool.ssm, pool.kv):
        for tensor in tensors.values():
            tensor.fill_(0.1)
    for state in states:
        state.length = context
    return states


def _pool_bytes(config: ModelConfig, dtype: torch.dtype, size: PoolSize) -> int:
    with torch.device("meta"):
        pool = StatePool(config, dtype, torch.device("meta"), size)
    return sum(t.numel() * t.element_size() for held in (pool.conv, pool.ssm, pool.kv) for t in held.values())


def _share(backbone: Tower) -> None:
    first: dict[str, nn.Module] = {}
    for i, layer in enumerate(backbone.layers):
        assert isinstance(layer, Layer)
        backbone.layers[i] = first.setdefault(layer.kind, layer)


def _bytes(tower: nn.Module, dtype: torch.dtype) -> int:
    return sum(p.numel() * loaded_dtype(name, dtype).itemsize for name, p in tower.named_parameters())


def _random(name: str, like: Tensor, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Tensor:
    """Random values that keep activations near 1."""
    if name.endswith(("norm.weight", "norm_f.weight", ".D")):
        return torch.ones(like.shape, dtype=dtype, device=device)
    if name.startswith("scale_shift_tables"):  # a conditioning without effect, since a random one would make all tokens alike
        return torch.tensor([0.0, 0.0, 1.0], dtype=dtype, device=device).unsqueeze(1).expand(like.shape).contiguous()
    if name.endswith(("bias", "A_log")) or name.startswith("t_block"):
        return torch.zeros(like.shape, dtype=dtype, device=device)
    if like.dim() == 3 and "experts" in name:
        # Every expert is a copy of the first: drawing billions of numbers would take longer than the timed steps.
        one = torch.empty(like.shape[1:], device=device).normal_(std=like.shape[-1] ** -0.5, generator=generator)
        return one.to(dtype).expand(like.shape).contiguous()
    return torch.empty(like.shape, device=device).normal_(std=like.shape[-1] ** -0.5, generator=generator).to(dtype)


def _pack(tower: nn.Module, config: ModelConfig, device: torch.device, experts: str, generator: torch.Generator) -> None:
    if resolve("auto", device) != "triton":
        raise ConfigError(f"experts: no kernel reads {experts} on {device.type}; unpacked, they would be timed as bf16")

    def stack(outputs: int, inputs: int) -> Packed:
        one = torch.empty(outputs, inputs, device=device).normal_(std=inputs**-0.5, generator=generator)
        packed = quantize(one, as_format(experts))
        repeated = (part.expand(config.n_routed_experts, *part.shape).contiguous() for part in packed.tensors)
        return Packed(packed.format, packed.inputs, *repeated)

    hidden, width = config.hidden_size, config.moe_intermediate_size
    for module in list(tower.modules()):
        if isinstance(module, MoE):
            module.pack(PackedExperts(stack(width, hidden), stack(hidden, width)))
