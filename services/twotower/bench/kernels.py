"""The time of each kernel alone, beside its plain torch form, its bytes, its multiplications and the device's limits."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from twotower.bench.clock import free_bytes, seconds_of
from twotower.bench.costs import Costs
from twotower.bench.random_tower import MEMORY_SHARE
from twotower.bench.roofline import Cost, Roofline
from twotower.model.config import ModelConfig
from twotower.model.pool import PAGE, pages_for
from twotower_kernels import experts, quant
from twotower_kernels.backend import load, resolve
from twotower_kernels.block import ScanWeights
from twotower_kernels.kernels import TORCH

Call = Callable[[], object]

KERNELS = ("norm", "scan", "commit", "apply", "attention", "route", "experts-bf16", "experts-fp8", "experts-fp4", "unmask")


@dataclass(frozen=True, slots=True)
class KernelRow:
    """One kernel at one size."""

    kernel: str
    batch: int
    context: int | None
    """Context tokens, for attention; other kernels have none."""
    cost: Cost
    least_s: float
    """The least time that the roofline allows."""
    kernel_s: float | None
    """The time of the device's own form, Triton or C++; None if there is none."""
    plain_s: float
    experts: tuple[float, int] | None = None
    """For the routed experts: how many were expected to be needed, and how many were."""

    @property
    def share(self) -> float:
        """The share of the roofline that the kernel reaches, or the plain form if there is no kernel."""
        return self.least_s / (self.plain_s if self.kernel_s is None else self.kernel_s)

    def as_json(self) -> dict[str, Any]:
        """The row for JSON."""
        return {**dataclasses.asdict(self), "share": self.share}


@dataclass(frozen=True, slots=True)
class _Case:
    cost: Cost
    plain: Call
    kernel: Call | None
    drawn: tuple[float, int] | None = None


class KernelBench:
    """Makes inputs of a model's shapes, and times the kernels on them. Weights and inputs are bf16."""

    def __init__(self, config: ModelConfig, device: torch.device, roofline: Roofline, budget_s: float) -> None:
        self._config = config
        self._device = device
        self._roofline = roofline
        self._budget_s = budget_s
        self._kernels = load(resolve("auto", device))
        self._generator = torch.Generator(device).manual_seed(0)

    @torch.inference_mode()
    def rows(self, kernels: tuple[str, ...], batches: list[int], contexts: list[int]) -> Iterator[KernelRow]:
        """Each kernel at each batch (and context, for attention); sizes that memory does not hold are left out."""
        for kernel in kernels:
            for batch in batches:
                for context in contexts if kernel == "attention" else [None]:
                    if self._needed(kernel, batch, context or 0) > MEMORY_SHARE * free_bytes(self._device):
                        continue
                    case = self._case(kernel, batch, context or 0)
                    time = partial(seconds_of, device=self._device, budget_s=self._budget_s)
                    kernel_s = None if case.kernel is None else time(case.kernel)
                    least = self._roofline.seconds(case.cost)
                    yield KernelRow(kernel, batch, context, case.cost, least, kernel_s, time(case.plain), case.drawn)

    def _needed(self, kernel: str, batch: int, context: int) -> float:
        """The approximate bytes of a kernel's inputs and of the plain form's intermediate results."""
        costs = Costs(self._config)
        if kernel.startswith("experts"):
            return self._config.n_routed_experts * costs.expert_bytes() * (4 if kernel != "experts-bf16" else 1.5)
        if kernel == "attention":
            return 2 * costs.attention(batch, self._config.block_size, context).bytes
        return 6 * (costs.unmask(batch, self._config.block_size) if kernel == "unmask" else costs.apply(batch, 1)).bytes

    def _case(self, kernel: str, batch: int, context: int) -> _Case:
        if kernel.startswith("experts"):
            return self._experts(batch, kernel.partition("-")[2])
        if kernel == "attention":
            return self._attention(batch, context)
        make: dict[str, Callable[[int], _Case]] = {
            "norm": self._norm,
            "scan": partial(self._scan, commit=False),
            "commit": partial(self._scan, commit=True),
            "apply": self._apply,
            "route": self._route,
            "unmask": self._unmask,
        }
        return make[kernel](batch)

    def _both(self, name: str, *args: Any, **options: Any) -> tuple[Call, Call | None]:
        """A computation in plain torch, and in the device's own form if there is one."""
        plain, own = getattr(TORCH, name), getattr(self._kernels, name)
        return partial(plain, *args, **options), None if own is plain else partial(own, *args, **options)

    def _normal(self, *shape: int, dtype: torch.dtype = torch.bfloat16, std: float = 1.0) -> Tensor:
        values = torch.empty(shape, device=self._device)
        return values.normal_(std=std, generator=self._generator).to(dtype)

    def _norm(self, batch: int) -> _Case:
        c = self._config
        rows = (batch, c.block_size, c.hidden_size)
        h, x = self._normal(*rows), self._normal(*rows)
        gate, shift, scale = (self._normal(batch, 1, c.hidden_size) for _ in range(3))
        args = (h, x, gate, torch.ones(c.hidden_size, device=self._device), c.layer_norm_epsilon, shift, scale)
        return _Case(Costs(c).norm(batch * c.block_size), *self._both("add_modulated_norm", *args, order="modulate_first"))

    def _scan(self, batch: int, *, commit: bool) -> _Case:
        c, device = self._config, self._device
        heads = c.mamba_num_heads
        projected = self._normal(batch, c.block_size, c.d_inner + c.conv_dim + heads)
        tail = self._normal(batch, c.conv_dim, c.conv_kernel)
        ssm = self._normal(batch, heads, c.mamba_head_dim, c.ssm_state_size, dtype=torch.float32)
        weight, bias = self._normal(c.conv_dim, 1, c.conv_kernel, std=0.5), self._normal(c.conv_dim)
        dt_bias, a = torch.full((heads,), -2.0, device=device), torch.full((heads,), -1.0, device=device)
        ones, norm = torch.ones(heads, device=device), torch.ones(c.d_inner, device=device)

        weights = ScanWeights(weight, bias, dt_bias, a, ones, norm, c.n_groups, c.layer_norm_epsilon, c.time_step_limit)
        name = "block_scan_commit" if commit else "block_scan"
        return _Case(Costs(c).scan(batch, c.block_size, commit=commit), *self._both(name, projected, tail, ssm, weights))

    def _apply(self, batch: int) -> _Case:
        c, length = self._config, self._config.block_size
        state = self._normal(batch, c.mamba_num_heads, c.mamba_head_dim, c.ssm_state_size, dtype=torch.float32)
        x = self._normal(batch, length, c.mamba_num_heads, c.mamba_head_dim)
        b = self._normal(batch, length, c.n_groups, c.ssm_state_size)
        dt = torch.full((batch, length, c.mamba_num_heads), 0.1, device=self._device)
        args = (state, x, b, dt, torch.full((c.mamba_num_heads,), -1.0, device=self._device))
        return _Case(Costs(c).apply(batch, length), *self._both("apply_factors_", *args))

    def _attention(self, batch: int, context: int) -> _Case:
        c, length = self._config, self._config.block_size
        q = self._normal(batch, c.num_attention_heads, length, c.head_dim)
        k, v = (self._normal(batch, c.num_key_value_heads, length, c.head_dim) for _ in range(2))
        width = pages_for(context)
        shape = (batch * width, c.num_key_value_heads, PAGE, c.head_dim)
        k_pages, v_pages = (torch.full(shape, 0.1, dtype=torch.bfloat16, device=self._device) for _ in range(2))
        table = torch.arange(batch * width, dtype=torch.int32, device=self._device).view(batch, width)
        lengths = torch.full((batch,), context, dtype=torch.int32, device=self._device)
        args = (q, k, v, k_pages, v_pages, table, lengths)
        return _Case(Costs(c).attention(batch, length, context), *self._both("attention", *args))

    def _routing(self, rows: int) -> dict[str, Any]:
        c = self._config
        return {
            "hidden": self._normal(rows, c.hidden_size),
            "weight": self._normal(c.n_routed_experts, c.hidden_size, std=c.hidden_size**-0.5).double(),  # towers load it so
            "correction": torch.zeros(c.n_routed_experts, device=self._device),
            "top_k": c.num_experts_per_tok,
            "groups": c.n_group,
            "top_groups": c.topk_group,
            "normalize": c.norm_topk_prob,
            "scale": c.routed_scaling_factor,
        }

    def _route(self, batch: int) -> _Case:
        rows = batch * self._config.block_size
        return _Case(Costs(self._config).route(rows), *self._both("route", **self._routing(rows)))

    def _experts(self, batch: int, precision: str) -> _Case:
        c, rows = self._config, batch * self._config.block_size
        asked = self._routing(rows)
        chosen, weights = experts.route(**asked)
        hidden: Tensor = asked["hidden"]
        drawn = chosen.unique().numel()
        costs = Costs(c, precision, drawn)
        counts = (costs.distinct(rows), drawn)
        # Every expert is a copy of the first: reading takes as long as with others, and making them less time.
        up = self._normal(c.moe_intermediate_size, c.hidden_size, std=c.hidden_size**-0.5)
        down = self._normal(c.hidden_size, c.moe_intermediate_size, std=c.moe_intermediate_size**-0.5)
        if precision == "bf16":
            stacks = [one.expand(c.n_routed_experts, *one.shape).contiguous() for one in (up, down)]
            return _Case(costs.experts(rows), *self._both("run_experts", hidden, chosen, weights, *stacks), counts)
        packed = [self._packed(one, "fp8" if precision == "fp8" else "fp4") for one in (up, down)]
        plain, kernel = partial(quant.quantized_experts, hidden, chosen, weights, *packed), None
        if self._kernels.name == "triton":
            from twotower_kernels.triton.quant import quantized_experts, supported

            kernel = partial(quantized_experts, hidden, chosen, weights, *packed) if supported(self._device) else None
        return _Case(costs.experts(rows), plain, kernel, counts)

    def _packed(self, one: Tensor, format: quant.Format) -> quant.Packed:
        packed = quant.quantize(one, format)
        parts = (part.expand(self._config.n_routed_experts, *part.shape).contiguous() for part in packed.tensors)
        return quant.Packed(format, packed.inputs, *parts)

    def _unmask(self, batch: int) -> _Case:
        c, length, device = self._config, self._config.block_size, self._device
        args: dict[str, Any] = {
            "logits": self._normal(batch, length, c.vocab_size, dtype=torch.float32),
            "tokens": torch.full((batch, length), c.mask_token_id, device=device),
            "masked": torch.ones(batch, length, dtype=torch.bool, device=device),
            "mask_id": c.mask_token_id,
            "gamma": torch.full((batch,), 0.8, device=device),
            "steps_left": torch.full((batch,), length, device=device),
            "temperature": torch.zeros(batch, device=device),
            "uniforms": torch.zeros(batch, length, dtype=torch.float64, device=device),
        }
        return _Case(Costs(c).unmask(batch, length), *self._both("unmask", **args))
