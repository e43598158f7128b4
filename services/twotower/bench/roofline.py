"""A device's limits, measured or given, and the least time of a computation on it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from twotower.bench.clock import seconds_of
from twotower.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Cost:
    """The least work of a computation: each input, weight and output moved once, and its multiplications."""

    bytes: float = 0.0
    flops: float = 0.0
    """Floating point operations; a multiplication and an addition count as two."""

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.bytes + other.bytes, self.flops + other.flops)

    def __mul__(self, times: float) -> Cost:
        return Cost(self.bytes * times, self.flops * times)


@dataclass(frozen=True, slots=True)
class Roofline:
    """A device's limits."""

    bytes_per_s: float
    """Bytes read and written, in all."""
    flops_per_s: float
    """Dense, bf16."""

    @classmethod
    def parse(cls, text: str) -> Roofline:
        """Limits from ``GB_S,TFLOPS``, for example "4800,989" for an H200. Raises ConfigError."""
        try:
            gigabytes, teraflops = (float(word) for word in text.split(","))
        except ValueError:
            raise ConfigError(f"roofline: must be two numbers, GB/s,TFLOPS, not {text!r}") from None
        if not (0 < gigabytes < math.inf and 0 < teraflops < math.inf):
            raise ConfigError(f"roofline: must be two positive numbers, not {text!r}")
        return cls(1e9 * gigabytes, 1e12 * teraflops)

    def seconds(self, cost: Cost) -> float:
        """The least time of a computation of this cost."""
        return max(cost.bytes / self.bytes_per_s, cost.flops / self.flops_per_s)

    def __str__(self) -> str:
        return f"{self.bytes_per_s / 1e9:,.1f} GB/s, {self.flops_per_s / 1e12:,.3f} TFLOPS"


def measure(device: torch.device, budget_s: float = 0.5) -> Roofline:
    """Measure a large copy and a large product of bf16 matrices; they are random, as constant ones take less power and time."""
    cuda = device.type == "cuda"
    source = torch.empty((1 << 30) if cuda else (1 << 26), dtype=torch.float32, device=device).normal_()
    target = torch.empty_like(source)
    copied = seconds_of(lambda: target.copy_(source), device, budget_s)
    n = 8192 if cuda else 1024
    a, b = (torch.empty(n, n, dtype=torch.bfloat16, device=device).normal_() for _ in range(2))
    product = seconds_of(lambda: a @ b, device, budget_s)
    return Roofline(2 * source.numel() * 4 / copied, 2 * n**3 / product)
