"""A process reads its own tower, and nothing of the other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support.checkpoints import write_sharded_checkpoint, write_tiny_checkpoint
from twotower.errors import CheckpointError, ConfigError
from twotower.model.checkpoint import Checkpoint
from twotower.model.tensors import CONTEXT_PREFIXES, DENOISER_PREFIXES
from twotower.model.weights import (
    ReadLog,
    export_tensors,
    load_context_tower,
    load_denoiser_tower,
    resolve_device,
    resolve_dtype,
)

CPU = torch.device("cpu")


def test_what_is_read_is_counted_and_is_one_tower(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(write_tiny_checkpoint(tmp_path))
    logs = {}
    for load, own in ((load_context_tower, CONTEXT_PREFIXES), (load_denoiser_tower, DENOISER_PREFIXES)):
        log = logs[load] = ReadLog()
        load(checkpoint, torch.float32, CPU, log)
        assert all(name.startswith(own) for name in log.names)
        assert len(set(log.names)) == len(log.names)
        assert log.num_bytes == sum(entry.num_bytes for name, entry in checkpoint.tensors.items() if name.startswith(own))
    assert sum(log.num_bytes for log in logs.values()) == sum(entry.num_bytes for entry in checkpoint.tensors.values())


def test_the_other_tower_may_be_missing_or_garbage(tmp_path: Path) -> None:
    path = write_sharded_checkpoint(tmp_path)
    other = path / "model-00002-of-00002.safetensors"
    other.write_bytes(b"\x00" * 64)
    load_context_tower(Checkpoint.open(path, ("context",)), torch.float32, CPU)
    other.unlink()
    load_context_tower(Checkpoint.open(path, ("context",)), torch.float32, CPU)


def test_pages_of_the_other_tower_stay_on_disk(tmp_path: Path) -> None:
    """Memory that a context tower takes does not grow with the size of the denoiser's file: nothing maps it."""
    path = write_sharded_checkpoint(tmp_path)
    tower = load_context_tower(Checkpoint.open(path, ("context",)), torch.float32, CPU)
    maps = Path("/proc/self/maps").read_text()
    assert str(path / "model-00002-of-00002.safetensors") not in maps
    assert tower.dtype is torch.float32


def test_loading_and_exporting_are_inverse(tmp_path: Path) -> None:
    path = write_tiny_checkpoint(tmp_path)
    checkpoint = Checkpoint.open(path)
    stored = load_file(path / "model.safetensors")
    exported = export_tensors(load_context_tower(checkpoint, torch.float32, CPU), torch.float32)
    exported |= export_tensors(load_denoiser_tower(checkpoint, torch.float32, CPU), torch.float32)
    assert exported.keys() == stored.keys()
    for name, tensor in stored.items():
        torch.testing.assert_close(exported[name], tensor, rtol=0, atol=0)


def test_sensitive_weights_stay_in_high_precision(tmp_path: Path) -> None:
    tower = load_context_tower(Checkpoint.open(write_tiny_checkpoint(tmp_path)), torch.bfloat16, CPU)
    dtypes = {name: parameter.dtype for name, parameter in tower.named_parameters()}
    assert dtypes["context_lm_head.weight"] is torch.bfloat16
    assert dtypes["context_tower.layers.1.mixer.experts.up_proj"] is torch.bfloat16
    assert dtypes["context_tower.layers.0.mixer.A_log"] is torch.float32
    assert dtypes["context_tower.layers.0.norm.weight"] is torch.float32
    assert dtypes["context_tower.layers.1.mixer.gate.weight"] is torch.float64


def test_dtype_and_device_are_checked(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(write_tiny_checkpoint(tmp_path))
    assert resolve_dtype("auto", checkpoint) is torch.float32
    with pytest.raises(ConfigError, match="dtype"):
        resolve_dtype("float16", checkpoint)
    for name in ("tpu", "cuda:99", "meta", "cuda:x"):
        with pytest.raises(ConfigError, match="device"):
            resolve_device(name)


def test_a_file_that_shrinks_after_opening(tmp_path: Path) -> None:
    path = write_tiny_checkpoint(tmp_path)
    checkpoint = Checkpoint.open(path)
    (path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load_context_tower(checkpoint, torch.float32, CPU)
