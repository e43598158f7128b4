"""Towers whose experts stay packed: a kernel reads them as they are stored (here in Triton's interpreter, without a GPU)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.support.checkpoints import write_tiny_checkpoint
from twotower.model.checkpoint import Checkpoint
from twotower.model.layers import MoE
from twotower.model.weights import load_context_tower, load_denoiser_tower
from twotower_kernels.quant import Format

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported anywhere
pytest.importorskip("triton")

pytestmark = pytest.mark.device

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    path: Path = tmp_path_factory.mktemp("tiny")
    return Checkpoint.open(write_tiny_checkpoint(path, moe_intermediate_size=40))


def _moe(tower: nn.Module) -> list[MoE]:
    return [module for module in tower.modules() if isinstance(module, MoE)]


@pytest.mark.parametrize("experts", ["fp8", "fp4"])
def test_packed_and_unpacked_towers_agree(checkpoint: Checkpoint, experts: Format) -> None:
    tokens = torch.arange(16, device=DEVICE) + 5
    results = {}
    for backend in ("torch", "triton"):
        context = load_context_tower(checkpoint, torch.float32, DEVICE, experts=experts, kernels=backend)
        denoiser = load_denoiser_tower(checkpoint, torch.float32, DEVICE, experts=experts, kernels=backend)
        assert all((moe.packed is not None) is (backend == "triton") for moe in (*_moe(context), *_moe(denoiser)))
        state = context.new_state()
        logits = context.prefill([tokens], [state])[0]
        assert logits is not None
        share = torch.ones(1, device=DEVICE)
        results[backend] = (logits, denoiser.denoise(torch.full((1, 16), 3, device=DEVICE), share, [state]))
    for near, far in zip(results["triton"], results["torch"], strict=True):
        torch.testing.assert_close(near, far, rtol=1e-3, atol=1e-3)


def test_packed_weights_take_their_bits_and_no_more(checkpoint: Checkpoint) -> None:
    tower = load_context_tower(checkpoint, torch.bfloat16, DEVICE, experts="fp8", kernels="triton")
    for moe in _moe(tower):
        assert not hasattr(moe, "experts")
        held = sum(buffer.numel() * buffer.element_size() for buffer in moe.buffers())
        weights = 2 * 8 * 32 * 40
        assert held == weights + 8 * (32 + 40) * 4
