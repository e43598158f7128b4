"""The optimizers: Muon for the matrices of the layers, AdamW for everything else."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic iteration (Keller Jordan, "Muon", 2024)."""

_NOT_MUON = ("embeddings.", "lm_head.", "gate.", "conv1d.", "t_embedder.", "t_block.", "scale_shift_tables.")


@dataclass(frozen=True, slots=True)
class OptimConfig:
    """Peak learning rates, both scaled by the schedule, and other settings."""

    muon_lr: float = 0.02
    adam_lr: float = 3e-3
    weight_decay: float = 0.01
    """Decoupled weight decay, on matrices only."""
    clip: float = 1.0
    """The largest norm of the gradient."""


class Optimizer:
    """Both optimizers behind one interface: step with scaled learning rates, save, load."""

    def __init__(self, model: nn.Module, config: OptimConfig) -> None:
        trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        matrices = [p for n, p in trained if p.dim() >= 2 and not any(part in n for part in _NOT_MUON)]
        chosen = set(map(id, matrices))
        others = [(n, p) for n, p in trained if id(p) not in chosen]
        decayed = [p for n, p in others if p.dim() >= 2 and "scale_shift" not in n]
        plain = [p for n, p in others if p.dim() < 2 or "scale_shift" in n]
        self._config = config
        self._parameters = [p for _, p in trained]
        self._muon = Muon(matrices, config.muon_lr, config.weight_decay)
        self._adam = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}],
            lr=config.adam_lr,
            betas=(0.9, 0.98),
            fused=all(p.device.type == "cuda" for p in self._parameters),
        )

    def step(self, scale: float) -> Tensor:
        """Clip, update with the learning rates times `scale`, clear the gradients. Returns their norm, on the device."""
        norm = nn.utils.clip_grad_norm_(self._parameters, self._config.clip)
        for optimizer, lr in ((self._muon, self._config.muon_lr), (self._adam, self._config.adam_lr)):
            for group in optimizer.param_groups:
                group["lr"] = lr * scale
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return norm

    def state_dict(self) -> dict[str, Any]:
        """The state for a later `load_state_dict`."""
        return {"muon": self._muon.state_dict(), "adam": self._adam.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from the point at which `state_dict` was called."""
        self._muon.load_state_dict(state["muon"])
        self._adam.load_state_dict(state["adam"])


class Muon(torch.optim.Optimizer):
    """Momentum with orthogonalized updates, for matrices (R, C) and stacks of them (E, R, C).

    All singular values of an update become about 1, so rare directions are learned as fast as frequent ones;
    scaled by sqrt(max(1, R / C)) as its author does.
    """

    def __init__(self, parameters: Iterable[Tensor], lr: float, weight_decay: float, momentum: float = 0.95) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update; matrices of one shape are orthogonalized in one batch."""
        for group in self.param_groups:
            by_shape: dict[tuple[int, ...], list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape[tuple(parameter.shape)].append(parameter)
            for shape, parameters in by_shape.items():
                gradients = [p.grad for p in parameters if p.grad is not None]
                for parameter in parameters:
                    if not self.state[parameter]:
                        self.state[parameter]["momentum"] = torch.zeros_like(parameter)
                momenta = [self.state[p]["momentum"] for p in parameters]
                torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
                updates = orthogonalize(torch.stack(torch._foreach_lerp(gradients, momenta, group["momentum"])))
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
                scale = max(1.0, shape[-2] / shape[-1]) ** 0.5
                torch._foreach_add_(parameters, list(updates.unbind(0)), alpha=-group["lr"] * scale)


def orthogonalize(matrix: Tensor, steps: int = 5) -> Tensor:
    """An approximation of the nearest (semi-)orthogonal matrix to (..., R, C), by Newton-Schulz iterations in bf16."""
    a, b, c = _NEWTON_SCHULZ
    wide = matrix.shape[-2] <= matrix.shape[-1]
    x = (matrix if wide else matrix.mT).bfloat16()
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return (x if wide else x.mT).to(matrix.dtype)
