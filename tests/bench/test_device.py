"""The benchmarks of kernels and towers: costs by hand, limits, tables; and whole runs at the smallest size."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from tests.support.checkpoints import TINY
from twotower.bench.clock import free_bytes, seconds_of
from twotower.bench.costs import Costs, least_seconds, total
from twotower.bench.kernels import KERNELS, KernelBench
from twotower.bench.random_tower import random_states, random_tower
from twotower.bench.roofline import Cost, Roofline
from twotower.bench.sizes import REAL
from twotower.bench.speedup import StepTimes, speedup_table
from twotower.cli.main import main
from twotower.errors import ConfigError
from twotower.model.config import ModelConfig
from twotower.model.context_tower import ContextTower
from twotower.model.denoiser_tower import DenoiserTower
from twotower.model.tensors import context_tensors
from twotower_kernels.quant import Format, quantize

CPU = torch.device("cpu")
CONFIG = ModelConfig.from_dict({**TINY, "block_size": 4})
REAL_CONFIG = ModelConfig.from_dict(REAL)
H200 = Roofline.parse("4800,989")


def test_experts_that_are_needed() -> None:
    costs = Costs(REAL_CONFIG)
    assert costs.distinct(1) == pytest.approx(6)
    assert costs.distinct(16) == pytest.approx(128 * (1 - (122 / 128) ** 16))
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.rand(16, 128, generator=generator).argsort(-1)[:, :6].unique().numel() for _ in range(300)]
    assert costs.distinct(16) == pytest.approx(sum(drawn) / len(drawn), rel=0.02)
    assert costs.distinct(10_000) == pytest.approx(128)


@pytest.mark.parametrize("precision", ["bf16", "fp8", "fp4"])
def test_bytes_of_an_expert_are_those_of_its_tensors(precision: Format) -> None:
    hidden, width = REAL_CONFIG.hidden_size, REAL_CONFIG.moe_intermediate_size
    shapes = ((width, hidden), (hidden, width))
    if precision in ("fp8", "fp4"):
        held = sum(quantize(torch.ones(shape), precision).num_bytes for shape in shapes)
    else:
        held = 2 * 2 * width * hidden
    assert Costs(REAL_CONFIG, precision).expert_bytes() == held


def test_a_step_over_many_tokens_reads_each_weight_once() -> None:
    """With all experts needed, an AR step's bytes are those of the weights, but for what batch and context add."""
    costs = Costs(REAL_CONFIG, read=128)
    weights = sum(2 * torch.Size(shape).numel() for name, shape in context_tensors(REAL_CONFIG) if "embeddings" not in name)
    assert total(costs.ar_step(1, 1)).bytes == pytest.approx(weights, rel=0.01)
    two, three = (total(costs.ar_step(1, n)).bytes for n in (1000, 2000))
    assert three - two == 6144 * 1000  # docs/model.md: KV of a token, all layers
    # Of those who compute for a token: 3.6 B parameters, of which embeddings are looked up only.
    assert total(costs.ar_step(1, 1)).flops == pytest.approx(2 * (3.6e9 - 131072 * 2688), rel=0.05)


def test_a_commit_ends_with_the_last_layer_that_has_a_state() -> None:
    costs = Costs(dataclasses.replace(CONFIG, hybrid_override_pattern="MEE"))
    assert [name for name, _ in costs.commit(1, 8)] == ["norm", "in_proj", "scan", "out_proj"]
    assert costs.denoiser_step(1, 8)["experts", costs.experts(4)] == 2


def test_a_roofline() -> None:
    roofline = Roofline.parse("10,2")
    assert roofline.seconds(Cost(20e9, 1e12)) == 2.0
    assert roofline.seconds(Cost(10e9, 6e12)) == 3.0
    assert total(Costs(CONFIG).commit(2, 8)).bytes > 0
    counts = Costs(CONFIG).commit(2, 8)
    assert least_seconds(counts, roofline) >= roofline.seconds(total(counts))
    for bad in ("4800", "a,b", "0,1", "1,inf", "1,2,3"):
        with pytest.raises(ConfigError, match="roofline"):
            Roofline.parse(bad)


def test_speedups() -> None:
    times = StepTimes(batch=2, context=128, block=16, denoiser=0.3, commit=0.8, ar=0.2)
    assert times.ar_tokens_per_s == 10
    assert times.one_batch(4.0) == pytest.approx(32 / (4 * 0.3 + 0.8))
    assert times.two_batches(4.0) == pytest.approx(32 / 1.2)
    assert times.two_batches(16.0) == pytest.approx(32 / 0.8)
    needed = times.needed(1.5)
    assert needed is not None
    assert times.one_batch(needed) == pytest.approx(15)
    assert times.needed(100.0) is None
    assert "never" in speedup_table([dataclasses.replace(times, commit=100.0)])[-1]


def test_a_random_tower_computes_and_may_share_its_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, shared = random_tower(DenoiserTower, CONFIG, torch.bfloat16, CPU)
    assert not shared
    assert len({id(layer) for layer in whole.denoiser_tower.layers}) == 7
    held = sum(p.numel() * p.element_size() for p in whole.parameters())
    monkeypatch.setattr("twotower.bench.random_tower.free_bytes", lambda device: held)
    small, shared = random_tower(DenoiserTower, CONFIG, torch.bfloat16, CPU)
    assert shared
    assert len({id(layer) for layer in small.denoiser_tower.layers}) == 4
    states = random_states(CONFIG, torch.bfloat16, CPU, 2, 5)
    assert states is not None
    tokens = torch.tensor([[5, 6, 3, 3]] * 2)
    for tower in (whole, small):
        assert tower.denoise(tokens, torch.ones(2), states).isfinite().all()
    monkeypatch.setattr("twotower.bench.random_tower.free_bytes", lambda device: 1000)
    with pytest.raises(ConfigError, match="size"):
        random_tower(ContextTower, CONFIG, torch.bfloat16, CPU)
    assert random_states(CONFIG, torch.bfloat16, CPU, 2, 5) is None


def test_every_kernel_is_timed() -> None:
    rows = list(KernelBench(CONFIG, CPU, H200, 0.001).rows(KERNELS, [1, 3], [8, 70]))
    assert [(row.kernel, row.batch, row.context) for row in rows if row.kernel == "attention"] == [
        ("attention", batch, context) for batch in (1, 3) for context in (8, 70)
    ]
    assert {row.kernel for row in rows} == set(KERNELS)
    assert all(row.plain_s > 0 and row.cost.bytes > 0 and 0 < row.share < 1 for row in rows)
    assert all(1 <= row.experts[1] <= 8 for row in rows if row.experts is not None)


def test_a_clock() -> None:
    calls: list[int] = []
    assert seconds_of(lambda: calls.append(1), CPU, 0.0) > 0
    assert len(calls) == 4
    assert free_bytes(CPU) > 1 << 20


def test_kernels(capsys: pytest.CaptureFixture[str]) -> None:
    words = "bench kernels --size small --only apply route --batch 1 2 --device cpu --seconds 0.001 --json"
    assert main(words.split()) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["roofline"]["bytes_per_s"] > 0
    assert [(row["kernel"], row["batch"]) for row in told["rows"]] == [(k, b) for k in ("apply", "route") for b in (1, 2)]
    assert main([*words.split(), "--only", "sort"]) == 1
    assert "sort" in capsys.readouterr().err


def test_towers(capsys: pytest.CaptureFixture[str]) -> None:
    words = "bench towers --size small --layers ME* --batch 2 --context 8 20 --device cpu --seconds 0.001 --json"
    assert main(words.split()) == 0
    told = json.loads(capsys.readouterr().out)
    rows = told["rows"]
    assert sorted((row["step"], row["context"]) for row in rows) == [
        (s, c) for s in ("ar", "commit", "denoiser") for c in (8, 20)
    ]
    assert all(row["seconds"] > 0 and row["plain_s"] > 0 for row in rows)
    assert len(told["needed_tokens_per_forward"]) == 2
    for bad, named in (("--layers MX", "layers"), ("--seconds 0", "seconds"), ("--batch 0", "batch")):
        assert main([*words.split(), *bad.split()]) == 1
        assert capsys.readouterr().err.rpartition("error: ")[2].startswith(named)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has the kernels")
def test_packed_experts_are_not_timed_where_nothing_reads_them(capsys: pytest.CaptureFixture[str]) -> None:
    words = "bench towers --size small --layers E --experts fp8 --batch 1 --context 8 --device cpu --seconds 0.001"
    assert main(words.split()) == 1
    assert "error: experts" in capsys.readouterr().err


def test_towers_by_a_roofline_alone(capsys: pytest.CaptureFixture[str]) -> None:
    least = {}
    for experts in ("bf16", "fp8", "fp4"):
        assert main(f"bench towers --roofline 4800,989 --experts {experts} --batch 1 64 --context 2048 --json".split()) == 0
        told = json.loads(capsys.readouterr().out)
        assert told["computed"]
        least[experts] = {(row["step"], row["batch"]): row["least_s"] for row in told["rows"]}
    assert all(least["fp4"][key] < least["fp8"][key] < least["bf16"][key] for key in least["bf16"])
    assert least["bf16"]["ar", 1] == pytest.approx(1.38e-3, rel=0.02)
