"""Routed experts on their way from a checkpoint's tensors into a tower's layers, at the precision that is asked for."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from twotower.errors import CheckpointError, ConfigError
from twotower.model.config import ModelConfig
from twotower.model.tensors import EXPERT_PARTS
from twotower_kernels.backend import Backend, BackendUnavailable, resolve
from twotower_kernels.quant import Format, NotQuantizable, Packed, dequantize, quantize

EXPERT = re.compile(r"(.*)\.experts\.(\d+)\.(up_proj|down_proj)\.(weight(?:_scale(?:_2)?)?)$")
"""An expert's tensor: the MoE layer, the expert, the projection, the part."""


class ExpertStacks:
    """Takes experts one by one as they are read, and gives them layer by layer.

    Quantized ones stay packed where a kernel reads them so: on a GPU with Triton. Elsewhere they are unpacked once,
    to the same values, in the model's dtype: unpacking them at every forward would take longer than the products.
    Weights that are quantized now have the bits that `twotower quantize` writes.
    """

    def __init__(
        self, stored: str, wanted: str, dtype: torch.dtype, device: torch.device, backend: Literal["auto"] | Backend = "auto"
    ) -> None:
        """stored and wanted: of PRECISIONS, where both are quantized they are the same. Raises ConfigError."""
        self._stored = stored
        self._wanted = wanted
        self._dtype = dtype
        self._device = device
        self._packed = wanted != "bf16" and _has_kernel(device, backend)
        self._stacks: dict[tuple[str, str], dict[str, Tensor]] = {}
        """(layer, projection) -> part -> (experts, ...)."""

    def take(self, name: str, tensor: Tensor, experts: int) -> bool:
        """Keep a copy if this is an expert's tensor, of so many experts; False if it is not. Raises CheckpointError."""
        expert = EXPERT.match(name)
        if expert is None:
            return False
        layer, index, projection, part = expert.groups()
        stacks = self._stacks.setdefault((layer, projection), {})
        for of_part, piece in self._pieces(name, part, tensor).items():
            if of_part not in stacks:
                stacks[of_part] = torch.empty((experts, *piece.shape), dtype=piece.dtype, device=self._device)
            stacks[of_part][int(index)] = piece
        return True

    def layers(self, config: ModelConfig) -> Iterator[tuple[str, Tensor | Packed, Tensor | Packed]]:
        """(name of a MoE layer, up (E, I, hidden), down (E, hidden, I)), each then given up here: one layer is held twice."""
        sizes = {"up_proj": config.hidden_size, "down_proj": config.moe_intermediate_size}
        for layer in sorted({layer for layer, _ in self._stacks}):
            up, down = (self._finished(self._stacks.pop((layer, name)), inputs) for name, inputs in sizes.items())
            yield layer, up, down

    def _pieces(self, name: str, part: str, tensor: Tensor) -> dict[str, Tensor]:
        if self._stored != "bf16":
            return {part: tensor}
        tensor = tensor.to(self._device)
        if self._wanted == "bf16":
            return {part: tensor.to(self._dtype)}
        packed = quantize_named(name, tensor, self._wanted)
        return dict(zip(EXPERT_PARTS[self._wanted], packed.tensors, strict=True))

    def _finished(self, stacks: dict[str, Tensor], inputs: int) -> Tensor | Packed:
        precision = self._wanted if self._stored == "bf16" else self._stored
        if precision == "bf16":
            return stacks["weight"]
        packed = Packed(as_format(precision), inputs, *(stacks[part] for part in EXPERT_PARTS[precision]))
        if self._packed:
            return packed
        experts = packed.values.shape[0]
        plain = torch.empty(experts, packed.outputs, inputs, dtype=self._dtype, device=self._device)
        for e in range(experts):  # one at a time: what lies between is in fp32
            plain[e] = dequantize(packed.select(torch.tensor([e], device=self._device)), self._dtype)[0]
        return plain


def quantize_named(name: str, tensor: Tensor, precision: str) -> Packed:
    """A checkpoint's tensor (outputs, inputs), quantized. Raises CheckpointError, which names it."""
    try:
        return quantize(tensor, as_format(precision))
    except NotQuantizable as error:
        raise CheckpointError(f"tensor {name}: {error}") from None


def as_format(precision: str) -> Format:
    """fp8 or fp4, of PRECISIONS."""
    return "fp8" if precision == "fp8" else "fp4"


def _has_kernel(device: torch.device, backend: Literal["auto"] | Backend) -> bool:
    try:
        if resolve(backend, device) != "triton":
            return False
    except BackendUnavailable as error:
        raise ConfigError(str(error)) from None
    from twotower_kernels.triton.quant import supported

    return supported(device)
