"""A session's state and its deltas as named tensors: what a worker receives, and how it becomes a state again.

Of a conv tail only the K - 1 columns travel that the next position reads; the oldest is zero on the worker.
State, per layer: Mamba ``conv ssm`` and ``a`` (the context tower's decay rates, needed to apply deltas),
attention ``k v``. Delta, per layer: Mamba ``x b dt conv``, attention ``k v`` of the committed tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from twotower.model.config import ATTENTION, MAMBA, ModelConfig
from twotower.model.state import ContextState, Delta, KVDelta, MambaDelta
from twotower.wire.frames import Key, Spec


def state_tensors(state: ContextState, decay_rates: Mapping[int, Tensor]) -> Iterator[tuple[Key, Tensor]]:
    """All tensors of a state, in the order of `state_spec`."""
    for i, mamba in state.mamba.items():
        yield Key("conv", i), mamba.conv[:, 1:]
        yield Key("ssm", i), mamba.ssm
        yield Key("a", i), decay_rates[i]
    for i, kv in state.kv.items():
        k, v = kv.slice(0, state.length)
        yield Key("k", i), k
        yield Key("v", i), v


@lru_cache(maxsize=64)
def state_spec(config: ModelConfig, dtype: torch.dtype, length: int) -> Mapping[Key, Spec]:
    """What a state of `length` tokens consists of."""
    spec: dict[Key, Spec] = {}
    for i in config.layers_of(MAMBA):
        spec[Key("conv", i)] = Spec(dtype, (config.conv_dim, config.conv_kernel - 1))
        spec[Key("ssm", i)] = Spec(torch.float32, (config.mamba_num_heads, config.mamba_head_dim, config.ssm_state_size))
        spec[Key("a", i)] = Spec(torch.float32, (config.mamba_num_heads,))
    return spec | _kv_spec(config, dtype, length)


def fill_state(state: ContextState, tensors: Mapping[Key, Tensor], length: int) -> dict[int, Tensor]:
    """Put tensors that fit `state_spec` into `state`; returns the context's decay rates."""
    for i, mamba in state.mamba.items():
        mamba.conv.copy_(_whole_tail(tensors[Key("conv", i)]))
        mamba.ssm.copy_(tensors[Key("ssm", i)])
    for i, kv in state.kv.items():
        kv.write(0, tensors[Key("k", i)], tensors[Key("v", i)])
    state.length = length
    return {i: tensors[Key("a", i)] for i in state.mamba}


def delta_tensors(delta: Delta) -> Iterator[tuple[Key, Tensor]]:
    """All tensors of a delta, in the order of `delta_spec`."""
    for i, change in delta.layers.items():
        if isinstance(change, MambaDelta):
            yield Key("x", i), change.x
            yield Key("b", i), change.b
            yield Key("dt", i), change.dt
            yield Key("conv", i), change.conv[:, 1:]
    for i, change in delta.layers.items():
        if isinstance(change, KVDelta):
            yield Key("k", i), change.k
            yield Key("v", i), change.v


@lru_cache(maxsize=64)
def delta_spec(config: ModelConfig, dtype: torch.dtype, length: int) -> Mapping[Key, Spec]:
    """What a delta of `length` tokens consists of."""
    spec: dict[Key, Spec] = {}
    for i in config.layers_of(MAMBA):
        spec[Key("x", i)] = Spec(dtype, (length, config.mamba_num_heads, config.mamba_head_dim))
        spec[Key("b", i)] = Spec(dtype, (length, config.n_groups, config.ssm_state_size))
        spec[Key("dt", i)] = Spec(torch.float32, (length, config.mamba_num_heads))
        spec[Key("conv", i)] = Spec(dtype, (config.conv_dim, config.conv_kernel - 1))
    return spec | _kv_spec(config, dtype, length)


def delta_from(tensors: Mapping[Key, Tensor], config: ModelConfig, length: int) -> Delta:
    """The delta, from tensors that fit `delta_spec`."""
    layers: dict[int, MambaDelta | KVDelta] = {
        i: MambaDelta(
            x=tensors[Key("x", i)],
            b=tensors[Key("b", i)],
            dt=tensors[Key("dt", i)],
            conv=_whole_tail(tensors[Key("conv", i)]),
        )
        for i in config.layers_of(MAMBA)
    }
    layers |= {i: KVDelta(tensors[Key("k", i)], tensors[Key("v", i)]) for i in config.layers_of(ATTENTION)}
    return Delta(length, layers)


def _whole_tail(columns: Tensor) -> Tensor:
    """(conv_dim, K - 1) -> (conv_dim, K)."""
    return F.pad(columns, (1, 0))


def _kv_spec(config: ModelConfig, dtype: torch.dtype, length: int) -> dict[Key, Spec]:
    shape = (config.num_key_value_heads, length, config.head_dim)
    return {Key(name, i): Spec(dtype, shape) for i in config.layers_of(ATTENTION) for name in ("k", "v")}
