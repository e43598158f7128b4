"""Compares the towers' states and logits with the reference's, within a tolerance."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from twotower.engine.local import LocalEngine
from twotower.errors import InvalidArgument
from twotower.model.state import ContextState

TOLERANCE = 1e-4
"""Absolute, fp32."""


def state_differences(engine: LocalEngine, directory: Path) -> Iterator[tuple[str, float]]:
    """(tensor's name, largest absolute difference) of everything in `states.safetensors`; infinite where shapes differ."""
    path = directory / "states.safetensors"
    if not path.exists():
        return
    try:
        expected = load_file(path)
    except (SafetensorError, OSError) as error:
        raise InvalidArgument("DIR", f"{path} cannot be read: {error}") from None
    context, denoiser = engine.context.tower, engine.denoiser.tower
    expected = {name: tensor.to(context.device) for name, tensor in expected.items()}
    state = context.new_state()
    (logits,) = context.prefill([expected["prompt"][0]], [state])
    assert logits is not None
    yield "prefill.logits", _difference(logits, expected["prefill.logits"][0])
    yield from _layers(expected, "prefill", state)
    if "denoise.all_mask.logits" in expected:
        size = expected["denoise.all_mask.logits"].shape[1]
        masks = torch.full((1, size), engine.limits.mask_token_id, device=denoiser.device)
        logits = denoiser.denoise(masks, torch.ones(1, device=denoiser.device), [state])
        yield "denoise.all_mask.logits", _difference(logits, expected["denoise.all_mask.logits"])
    if "denoise.partial.logits" in expected:
        logits = denoiser.denoise(expected["denoise.partial.block"], expected["denoise.partial.t"], [state])
        yield "denoise.partial.logits", _difference(logits, expected["denoise.partial.logits"])
    if "commit.block" in expected:
        context.commit(expected["commit.block"], [state])
        yield from _layers(expected, "commit", state)


def _layers(expected: dict[str, Tensor], stage: str, state: ContextState) -> Iterator[tuple[str, float]]:
    for name, tensor in expected.items():
        parts = name.split(".")
        if parts[0] != stage or len(parts) != 3 or not parts[1].isdigit():
            continue
        layer, kind = int(parts[1]), parts[2]
        if kind in ("k", "v"):
            ours = state.kv[layer].slice(0, state.length)["kv".index(kind)]
        else:
            ours = state.mamba[layer].conv if kind == "conv" else state.mamba[layer].ssm
        yield name, _difference(ours, tensor[0])


def _difference(ours: Tensor | None, theirs: Tensor) -> float:
    if ours is None or ours.shape != theirs.shape:
        return float("inf")
    return (ours.float() - theirs.float()).abs().max().item() if ours.numel() else 0.0
