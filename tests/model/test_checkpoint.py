"""Checkpoints known by their headers: damage is found, and named, before anything is loaded."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.checkpoints import write_sharded_checkpoint, write_tiny_checkpoint
from twotower.cli.options import DEFAULT_CHECKPOINT
from twotower.errors import CheckpointError, ConfigError
from twotower.model.checkpoint import Checkpoint


def test_equal_checkpoints_have_equal_identities(tmp_path: Path) -> None:
    first, second = (Checkpoint.open(write_tiny_checkpoint(tmp_path / name)) for name in "ab")
    other_weights = Checkpoint.open(write_tiny_checkpoint(tmp_path / "c", seed=1))
    other_config = Checkpoint.open(write_tiny_checkpoint(tmp_path / "d", routed_scaling_factor=1.0))
    assert first.identity == second.identity
    assert len({first.identity, other_weights.identity, other_config.identity}) == 3


def test_identity_is_the_same_from_either_tower(tmp_path: Path) -> None:
    for path in (write_tiny_checkpoint(tmp_path / "single"), write_sharded_checkpoint(tmp_path / "sharded")):
        assert len({Checkpoint.open(path, towers).identity for towers in (("context",), ("denoiser",))}) == 1


def test_missing_parts(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        Checkpoint.open(tmp_path / "none")
    path = write_tiny_checkpoint(tmp_path / "a")
    with pytest.raises(CheckpointError, match="not a directory"):
        Checkpoint.open(path / "config.json")
    (path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors"):
        Checkpoint.open(path)
    (path / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json does not exist"):
        Checkpoint.open(path)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_files(tmp_path: Path, keep: int) -> None:
    file = write_tiny_checkpoint(tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        Checkpoint.open(tmp_path)


def test_a_damaged_header(tmp_path: Path) -> None:
    file = write_tiny_checkpoint(tmp_path) / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[20:30] = b"\xff" * 10
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match="header"):
        Checkpoint.open(tmp_path)


def test_tensors_that_do_not_fit(tmp_path: Path) -> None:
    file = write_tiny_checkpoint(tmp_path) / "model.safetensors"
    tensors = load_file(file)
    name = "context_tower.layers.0.mixer.in_proj.weight"
    good = tensors[name]
    for bad, message in ((good[:-1].contiguous(), "shape"), (good.half(), "dtype F16"), (None, "missing")):
        others = {key: value for key, value in tensors.items() if key != name}
        save_file(others if bad is None else {**others, name: bad}, file)
        with pytest.raises(CheckpointError, match=rf"{name}.*{message}"):
            Checkpoint.open(tmp_path)
        Checkpoint.open(tmp_path, ("denoiser",))  # whose tensors are all there


def test_a_worker_needs_its_own_shard_only(tmp_path: Path) -> None:
    path = write_sharded_checkpoint(tmp_path)
    (path / "model-00002-of-00002.safetensors").unlink()
    Checkpoint.open(path, ("context",))
    with pytest.raises(CheckpointError, match="model-00002-of-00002"):
        Checkpoint.open(path, ("denoiser",))


def _identities(*paths: Path, **named: str) -> set[str]:
    return {Checkpoint.open(path, **named).identity for path in paths}


def test_shards_that_say_what_they_hold_are_told_apart(tmp_path: Path) -> None:
    first, again, other = (
        write_sharded_checkpoint(tmp_path / name, int(seed), hashed=True) for name, seed in ("a0", "b0", "c1")
    )
    assert len(_identities(first, again)) == 1
    assert len(_identities(first, other)) == 2
    assert Checkpoint.open_shared(first, context_experts="auto", revision=None).unsure is None
    # One shard of two is another's: that is a third model.
    shard = "model-00002-of-00002.safetensors"
    shutil.copy(other / shard, again / shard)
    assert len(_identities(first, again, other)) == 3
    assert len({Checkpoint.open(again, towers).identity for towers in (("context",), ("denoiser",))}) == 1


def test_shards_that_do_not_say_what_they_hold_are_not_shared_unless_their_revision_is_named(tmp_path: Path) -> None:
    first, other = (write_sharded_checkpoint(tmp_path / name, int(seed)) for name, seed in ("a0", "b1"))
    assert len(_identities(first, other)) == 1  # their headers are equal, so ...
    for path in (first, other):
        with pytest.raises(ConfigError, match=r"^revision: .* holds no hash of its content.*--revision NAME"):
            Checkpoint.open_shared(path, context_experts="auto", revision=None)
    named = [
        Checkpoint.open_shared(path, context_experts="auto", revision=name).identity
        for path, name in ((first, "v1"), (other, "v2"), (first, "v1"))
    ]
    assert named[0] == named[2] != named[1]
    with pytest.raises(ConfigError, match="revision: must not be empty"):
        Checkpoint.open(first, revision="")


def test_a_single_file_without_a_hash_is_not_shared_either(tmp_path: Path) -> None:
    file = write_tiny_checkpoint(tmp_path) / "model.safetensors"
    assert Checkpoint.open(tmp_path).unsure is None
    save_file(load_file(file), file)
    with pytest.raises(ConfigError, match="revision"):
        Checkpoint.open_shared(tmp_path, context_experts="auto", revision=None)


def test_the_checkpoint_that_ships_says_what_it_holds() -> None:
    """So that separate services serve it without a revision."""
    assert Checkpoint.open_shared(DEFAULT_CHECKPOINT, context_experts="auto", revision=None).unsure is None


def test_a_missing_shard_makes_the_identity_unsure_unless_the_index_or_a_revision_speaks_for_it(tmp_path: Path) -> None:
    path = write_sharded_checkpoint(tmp_path, hashed=True)
    shard, index = path / "model-00002-of-00002.safetensors", path / "model.safetensors.index.json"
    whole = Checkpoint.open(path, revision="v1").identity
    told = json.loads(index.read_text())
    shard.rename(path / "elsewhere")
    with pytest.raises(ConfigError, match=r"lacks model-00002-of-00002\.safetensors"):
        Checkpoint.open_shared(path, ("context",), context_experts="auto", revision=None)
    assert Checkpoint.open_shared(path, ("context",), context_experts="auto", revision="v1").identity == whole
    index.write_text(json.dumps({**told, "metadata": {"content_sha256": "ab" * 32}}))
    alone = Checkpoint.open_shared(path, ("context",), context_experts="auto", revision=None).identity
    (path / "elsewhere").rename(shard)
    assert Checkpoint.open(path).identity == alone
    index.write_text(json.dumps({**told, "metadata": {"content_sha256": "cd" * 32}}))
    assert Checkpoint.open(path).identity != alone


def test_a_snapshot_of_the_hub_names_its_own_revision(tmp_path: Path) -> None:
    first, other = (
        Checkpoint.open_shared(
            write_sharded_checkpoint(tmp_path / "snapshots" / (digit * 40)), context_experts="auto", revision=None
        )
        for digit in "ab"
    )
    assert first.identity != other.identity


@pytest.mark.parametrize("index", ["", "{}", '{"weight_map": 3}', "[]"])
def test_a_damaged_index(tmp_path: Path, index: str) -> None:
    path = write_sharded_checkpoint(tmp_path)
    (path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match="index"):
        Checkpoint.open(path)


def test_an_index_that_lacks_a_tensor(tmp_path: Path) -> None:
    path = write_sharded_checkpoint(tmp_path) / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    del index["weight_map"]["lm_head.weight"]
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is missing"):
        Checkpoint.open(tmp_path)


def test_opening_needs_no_torch(tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path)
    code = (
        "import sys; from twotower.model.checkpoint import Checkpoint; "
        f"Checkpoint.open({str(tmp_path)!r}); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_bf16_storage_is_accepted(tmp_path: Path) -> None:
    file = write_tiny_checkpoint(tmp_path) / "model.safetensors"
    save_file({k: v.to(torch.bfloat16) for k, v in load_file(file).items()}, file)
    assert Checkpoint.open(tmp_path).tensors["lm_head.weight"].dtype == "BF16"
