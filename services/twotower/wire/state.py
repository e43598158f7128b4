"""A session's state and its deltas as named tensors, and the way back to a state on the worker.

Only the K - 1 columns of a conv tail that the next position reads are sent; the oldest is zero on the worker.
State, per layer: Mamba ``conv ssm`` and ``a`` (the context tower's decay rates, needed to apply deltas),
attention ``k v``. Deltas of a commit, per layer, with the rows' axis in front: Mamba ``x b dt conv``, attention ``k v`` of the
committed tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from twotower.model.config import ATTENTION, MAMBA, ModelConfig
from twotower.model.delta_batch import DeltaBatch
from twotower.model.state import ContextState, KVDelta
from twotower.wire.frames import Key, Spec
from twotower_kernels.block import ScanFactors


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
    """The tensors of a state of `length` tokens."""
    spec: dict[Key, Spec] = {}
    for i in config.layers_of(MAMBA):
        spec[Key("conv", i)] = Spec(dtype, (config.conv_dim, config.conv_kernel - 1))
        spec[Key("ssm", i)] = Spec(torch.float32, (config.mamba_num_heads, config.mamba_head_dim, config.ssm_state_size))
        spec[Key("a", i)] = Spec(torch.float32, (config.mamba_num_heads,))
    return spec | _kv_spec(config, dtype, length)


def fill_state(state: ContextState, tensors: Mapping[Key, Tensor], length: int) -> dict[int, Tensor]:
    """Copy tensors that match `state_spec` into `state`; returns the context's decay rates."""
    for i, mamba in state.mamba.items():
        mamba.conv.copy_(_whole_tail(tensors[Key("conv", i)]))
        mamba.ssm.copy_(tensors[Key("ssm", i)])
    for i, kv in state.kv.items():
        kv.write(0, tensors[Key("k", i)], tensors[Key("v", i)])
    state.length = length
    return {i: tensors[Key("a", i)] for i in state.mamba}


def delta_tensors(deltas: DeltaBatch) -> list[tuple[Key, Tensor]]:
    """All tensors of a commit's deltas, in the order of `delta_spec`."""
    tensors: list[tuple[Key, Tensor]] = []
    for i, change in deltas.layers.items():
        if isinstance(change, ScanFactors):
            tensors += [(Key("x", i), change.x), (Key("b", i), change.b), (Key("dt", i), change.dt)]
            tensors.append((Key("conv", i), change.conv[:, :, 1:]))
    for i, change in deltas.layers.items():
        if isinstance(change, KVDelta):
            tensors += [(Key("k", i), change.k), (Key("v", i), change.v)]
    return tensors


@lru_cache(maxsize=256)
def delta_spec(config: ModelConfig, dtype: torch.dtype, rows: int, length: int) -> Mapping[Key, Spec]:
    """The tensors of the deltas of `rows` sessions, `length` tokens each."""
    spec: dict[Key, Spec] = {}
    for i in config.layers_of(MAMBA):
        spec[Key("x", i)] = Spec(dtype, (rows, length, config.mamba_num_heads, config.mamba_head_dim))
        spec[Key("b", i)] = Spec(dtype, (rows, length, config.n_groups, config.ssm_state_size))
        spec[Key("dt", i)] = Spec(torch.float32, (rows, length, config.mamba_num_heads))
        spec[Key("conv", i)] = Spec(dtype, (rows, config.conv_dim, config.conv_kernel - 1))
    shape = (rows, config.num_key_value_heads, length, config.head_dim)
    return spec | {Key(name, i): Spec(dtype, shape) for i in config.layers_of(ATTENTION) for name in ("k", "v")}


def delta_from(tensors: Mapping[Key, Tensor], config: ModelConfig, length: int) -> DeltaBatch:
    """The deltas, from tensors that match `delta_spec`."""
    layers: dict[int, ScanFactors | KVDelta] = {
        i: ScanFactors(
            x=tensors[Key("x", i)],
            b=tensors[Key("b", i)],
            dt=tensors[Key("dt", i)],
            conv=_whole_tail(tensors[Key("conv", i)]),
        )
        for i in config.layers_of(MAMBA)
    }
    layers |= {i: KVDelta(tensors[Key("k", i)], tensors[Key("v", i)]) for i in config.layers_of(ATTENTION)}
    return DeltaBatch(length, layers)


def _whole_tail(columns: Tensor) -> Tensor:
    """(..., K - 1) -> (..., K)."""
    return F.pad(columns, (1, 0))


def _kv_spec(config: ModelConfig, dtype: torch.dtype, length: int) -> dict[Key, Spec]:
    shape = (config.num_key_value_heads, length, config.head_dim)
    return {Key(name, i): Spec(dtype, shape) for i in config.layers_of(ATTENTION) for name in ("k", "v")}
