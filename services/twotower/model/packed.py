"""Routed experts whose weights stay quantized in memory: a kernel reads them as they are stored."""

from __future__ import annotations

from torch import Tensor, nn

from twotower_kernels.quant import Packed


class PackedExperts(nn.Module):
    """The experts of a MoE layer, up (E, I, hidden) and down (E, hidden, I), in one format. For inference only.

    Importing Triton is left to the first of them: nothing else needs it.
    """

    def __init__(self, up: Packed, down: Packed) -> None:
        super().__init__()
        from twotower_kernels.triton.quant import quantized_experts

        self._compute = quantized_experts
        self._format, self._inputs = up.format, (up.inputs, down.inputs)
        for side, packed in (("up", up), ("down", down)):
            for i, tensor in enumerate(packed.tensors):
                self.register_buffer(f"{side}_{i}", tensor)

    @property
    def matrices(self) -> tuple[Packed, Packed]:
        """Up and down."""
        count = 2 if self._format == "fp8" else 3
        up, down = ([self.get_buffer(f"{side}_{i}") for i in range(count)] for side in ("up", "down"))
        return Packed(self._format, self._inputs[0], *up), Packed(self._format, self._inputs[1], *down)

    def forward(self, hidden: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        """hidden (N, hidden), experts (N, k) int64, weights (N, k) fp32 -> (N, hidden) fp32."""
        return self._compute(hidden, experts, weights, *self.matrices)
