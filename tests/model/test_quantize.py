"""Checkpoints with quantized experts: written, recognised, loaded to the same values, and never taken for another."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.support.checkpoints import write_sharded_checkpoint, write_tiny_checkpoint
from twotower.engine.local import LocalEngine
from twotower.errors import CheckpointError, ConfigError
from twotower.model.checkpoint import Checkpoint, resolve_experts
from twotower.model.quantize import quantize_checkpoint
from twotower.model.weights import load_context_tower, load_denoiser_tower, read_tensors
from twotower.request import GenerationParams
from twotower_kernels.quant import Format, dequantize, quantize

CPU = torch.device("cpu")
FORMATS: list[Format] = ["fp8", "fp4"]
BOTH = ("context", "denoiser")
UP = "context_tower.layers.1.mixer.experts.3.up_proj.weight"


@pytest.fixture
def plain(tmp_path: Path) -> Checkpoint:
    # 40 is no multiple of a group, and no power of two.
    return Checkpoint.open(write_tiny_checkpoint(tmp_path / "plain", moe_intermediate_size=40))


def _written(plain: Checkpoint, experts: str, towers: tuple[str, ...] = BOTH) -> Checkpoint:
    out = plain.path.parent / "-".join((experts, *towers))
    quantize_checkpoint(plain, out, experts, towers)
    return Checkpoint.open(out)


def _parameters(tower: nn.Module) -> dict[str, Tensor]:
    return dict(tower.named_parameters())


@pytest.mark.parametrize("experts", FORMATS)
def test_stored_or_quantized_at_load_the_weights_are_the_same(plain: Checkpoint, experts: Format) -> None:
    stored = _written(plain, experts)
    for load in (load_context_tower, load_denoiser_tower):
        for dtype in (torch.float32, torch.bfloat16):
            at_load, own = load(plain, dtype, CPU, experts=experts), load(stored, dtype, CPU)
            unpacked = load(stored, dtype, CPU, experts="bf16")
            expected = _parameters(at_load)
            for tower in (own, unpacked):
                assert all(torch.equal(value, expected[name]) for name, value in _parameters(tower).items())
            original = _parameters(load(plain, dtype, CPU))
            changed = {name for name, value in expected.items() if not torch.equal(value, original[name])}
            assert changed == {name for name in expected if name.endswith((".experts.up_proj", ".experts.down_proj"))}
    (weight,) = read_tensors(plain, [UP]).values()
    loaded = _parameters(load_context_tower(stored, torch.float32, CPU))["context_tower.layers.1.mixer.experts.up_proj"]
    assert torch.equal(loaded[3], dequantize(quantize(weight, experts)))


@pytest.mark.parametrize(("experts", "dtypes"), [("fp8", ["F8_E4M3", "F32"]), ("fp4", ["U8", "F8_E4M3", "F32"])])
def test_what_is_written(plain: Checkpoint, experts: str, dtypes: list[str]) -> None:
    stored = _written(plain, experts)
    config = json.loads((stored.path / "config.json").read_text())
    assert config["context_experts"] == config["denoiser_experts"] == experts
    assert config["time_step_limit"] == [0.0, float("inf")]
    names = [UP, f"{UP}_scale", f"{UP}_scale_2"][: len(dtypes)]
    assert [stored.tensors[name].dtype for name in names] == dtypes
    others = {name: entry for name, entry in plain.tensors.items() if ".experts." not in name}
    assert all(stored.tensors[name].dtype == entry.dtype for name, entry in others.items())
    assert set(stored.tensors) - set(plain.tensors) == {n for n in stored.tensors if n.endswith(("_scale", "_scale_2"))}


def test_one_tower_alone(plain: Checkpoint) -> None:
    stored = _written(plain, "fp4", ("denoiser",))
    assert (stored.config.context_experts, stored.config.denoiser_experts) == ("bf16", "fp4")
    assert stored.tensors[UP].dtype == "F32"
    twice = stored.path.parent / "twice"
    quantize_checkpoint(stored, twice, "fp8", ("context",))
    both = Checkpoint.open(twice)
    assert (both.config.context_experts, both.config.denoiser_experts) == ("fp8", "fp4")
    again = _parameters(load_denoiser_tower(both, torch.float32, CPU))
    once = _parameters(load_denoiser_tower(stored, torch.float32, CPU))
    assert all(torch.equal(again[name], once[name]) for name in once)


def test_shards(tmp_path: Path) -> None:
    plain = Checkpoint.open(write_sharded_checkpoint(tmp_path / "plain"))
    whole, out = tmp_path / "whole", tmp_path / "out"
    quantize_checkpoint(plain, whole, "fp8", BOTH)
    quantize_checkpoint(plain, out, "fp8", BOTH, shard_bytes=60_000)
    files = sorted(out.glob("*.safetensors"))
    assert len(files) > 2
    assert files[-1].name == f"model-{len(files):05}-of-{len(files):05}.safetensors"
    for file in files:  # a worker needs the shards of its own tower only
        assert len({name.startswith(("context_tower.", "context_lm_head.")) for name in load_file(file)}) == 1
    tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    for name, tensor in load_file(whole / "model.safetensors").items():
        assert torch.equal(tensor.float(), tensors.pop(name).float())
    assert not tensors
    Checkpoint.open(out)


def test_identities(plain: Checkpoint) -> None:
    """Contexts of one identity compute the same states, whatever the denoisers are."""

    def identity(path: Path, context_experts: str = "auto", towers: tuple[str, ...] = BOTH) -> str:
        return Checkpoint.open(path, towers, context_experts=context_experts).identity

    same = {identity(plain.path, e, towers) for e in ("auto", "bf16") for towers in (BOTH, ("context",), ("denoiser",))}
    assert len(same) == 1
    ways = {identity(plain.path, "fp8", towers) for towers in (BOTH, ("context",), ("denoiser",))}
    assert len(ways) == 1
    stored = _written(plain, "fp8")
    assert len({identity(stored.path, e) for e in ("auto", "fp8", "bf16")}) == 1  # the same weights, packed or not
    all_of_them = {*same, *ways, identity(plain.path, "fp4"), identity(stored.path), _written(plain, "fp4").identity}
    assert len(all_of_them) == 5


def test_precisions_that_cannot_be(plain: Checkpoint) -> None:
    with pytest.raises(ConfigError, match="fp16"):
        resolve_experts("fp16", "bf16")
    stored = _written(plain, "fp8")
    for attempt in (
        lambda: load_context_tower(stored, torch.float32, CPU, experts="fp4"),
        lambda: Checkpoint.open(stored.path, context_experts="fp4"),
        lambda: quantize_checkpoint(stored, plain.path.parent / "new", "fp4", BOTH),
    ):
        with pytest.raises(ConfigError, match="stores them in fp8"):
            attempt()
    with pytest.raises(ConfigError, match="already"):
        quantize_checkpoint(stored, plain.path.parent / "new", "fp8", BOTH)
    with pytest.raises(ConfigError, match="not an empty directory"):
        quantize_checkpoint(plain, stored.path, "fp8", BOTH)
    with pytest.raises(ConfigError, match="triton"):
        load_context_tower(stored, torch.float32, CPU, kernels="tritonn")


def test_damage_is_named(plain: Checkpoint) -> None:
    stored = _written(plain, "fp4")
    file = stored.path / "model.safetensors"
    tensors = load_file(file)
    for name, bad, message in (
        (UP, tensors[UP][:, :-1].contiguous(), "shape"),
        (UP, tensors[UP].to(torch.int8), "dtype I8"),
        (f"{UP}_scale", tensors[f"{UP}_scale"].float(), "dtype F32"),
        (f"{UP}_scale_2", None, "missing"),
    ):
        others = {key: value for key, value in tensors.items() if key != name}
        save_file(others if bad is None else {**others, name: bad}, file)
        with pytest.raises(CheckpointError, match=rf"{name} .*{message}"):
            Checkpoint.open(stored.path)
    config = json.loads((stored.path / "config.json").read_text())
    (stored.path / "config.json").write_text(json.dumps({**config, "context_experts": "int3"}))
    with pytest.raises(CheckpointError, match="context_experts"):
        Checkpoint.open(stored.path)


def test_weights_that_cannot_be_quantized_are_named(plain: Checkpoint) -> None:
    file = plain.path / "model.safetensors"
    tensors = load_file(file)
    tensors[UP][0, 0] = torch.inf
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=rf"{UP}.*infinity"):
        load_context_tower(Checkpoint.open(plain.path), torch.float32, CPU, experts="fp8")
    with pytest.raises(CheckpointError, match=rf"{UP}.*infinity"):
        quantize_checkpoint(plain, plain.path.parent / "new", "fp8", BOTH)


def test_towers_of_different_precision_generate(plain: Checkpoint) -> None:
    params = GenerationParams(max_tokens=40, steps=5, gamma=1.0)
    engines = {
        (context, experts): LocalEngine(plain.path, threads=1, experts=experts, context_experts=context)
        for context in ("bf16", "fp4")
        for experts in ("bf16", "fp4")
    }
    states = {}
    for key, engine in engines.items():
        session = engine.context.open("s", [5, 6, 7, 8], params)
        engine.context.prefill(session, 4)
        states[key] = session.state.mamba[4].ssm
        assert len(engine.generate([5, 6, 7, 8], params).token_ids) == 40
    assert torch.equal(states["bf16", "bf16"], states["bf16", "fp4"])  # the denoiser's precision touches no state
    assert not torch.equal(states["bf16", "bf16"], states["fp4", "bf16"])
