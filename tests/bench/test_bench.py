"""The benchmarks on a tiny checkpoint: they do the work they time, and tell what they promise."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.checkpoints import TINY, write_tiny_checkpoint
from tests.support.processes import up
from twotower.bench.baseline import generate_plain, make_plain
from twotower.bench.checkpoint import write_random_checkpoint
from twotower.bench.prefix import PrefixResult, SharedPrompts
from twotower.bench.sizes import delta_bytes, snapshot_bytes
from twotower.bench.workload import Workload
from twotower.cli.main import main
from twotower.engine.local import LocalEngine


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


def test_the_plain_way_writes_the_engines_tokens(checkpoint: Path) -> None:
    workload = Workload(vocab_size=96, prompt_tokens=9, max_tokens=40)
    engine, plain = LocalEngine(checkpoint, threads=1), LocalEngine(checkpoint, threads=1)
    make_plain(plain.context.tower)
    make_plain(plain.denoiser.tower)
    for prompt in workload.prompts(3):
        expected = engine.generate(prompt, workload.params)
        assert expected.forwards == 5 * expected.blocks
        assert generate_plain(plain.context, plain.denoiser, prompt, workload.params) == expected.token_ids


def test_a_blocks_delta_at_the_real_size_is_at_most_5_megabytes() -> None:
    assert delta_bytes() <= 5_000_000
    assert 10 * delta_bytes() < snapshot_bytes()


def test_a_random_checkpoint_can_be_served(tmp_path: Path) -> None:
    assert write_random_checkpoint(tmp_path, raw=TINY) > 0
    assert len(LocalEngine(tmp_path, threads=1).generate([5], Workload(96, max_tokens=20).params).token_ids) == 20


def test_engine(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = f"bench engine --checkpoint {checkpoint} --threads 1 --batch 1 3 --rounds 1 --max-tokens 20 --json"
    assert main(words.split()) == 0
    told = json.loads(capsys.readouterr().out)
    assert [row["batch"] for row in told["rows"]] == [1, 3]
    assert min(told["batch_gain"], told["engine_over_plain"], told["plain_tokens_per_s"]) > 0


@pytest.mark.parametrize("load", ["--concurrency 1 4", "--concurrency 4 --rate 20"])
def test_serving(checkpoint: Path, capfd: pytest.CaptureFixture[str], load: str) -> None:
    words = f"bench serving --checkpoint {checkpoint} --threads 1 {load} --rounds 1 --max-tokens 20 --json"
    assert main(words.split()) == 0
    told = json.loads(capfd.readouterr().out)
    promised = "engine_tokens_per_s services_tokens_per_s services_over_engine batch_gain ttft_ms delta_bytes_real_size"
    assert {*promised.split(), "snapshot_bytes_real_size"} <= told.keys()
    assert told["rows"][-1] | {"requests": 4, "concurrency": 4} == told["rows"][-1]


def test_shared_prompts_share_their_beginning_within_a_round_only() -> None:
    work = SharedPrompts(96, 16, prefix_tokens=20, tail_tokens=5, requests=3, rounds=2, steps=5, seed=0)
    rounds = work.prompts()
    assert [[len(prompt) for prompt in each] for each in rounds] == [[25] * 3] * 2
    assert [len({tuple(prompt[:20]) for prompt in each}) for each in rounds] == [1, 1]
    assert rounds[0][0][:20] != rounds[1][0][:20]
    assert len({tuple(prompt) for each in rounds for prompt in each}) == 6


def test_what_is_told_of_shared_prompts() -> None:
    result = PrefixResult([[4.0, 3.0, 1.0], [8.0, 1.0, 2.0], [6.0, 2.0, 2.0]], [0.5, 1.5, 0.8])
    assert (result.first_ms, result.following_ms, result.place_ms) == (6000.0, 2000.0, [6000.0, 2000.0, 2000.0])
    assert result.ratio == pytest.approx(1 / 3)
    assert result.alone_ms == pytest.approx(800)
    assert result.beginning == pytest.approx((2.0 - 0.8) / 6.0)


def test_prefix(checkpoint: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = "bench prefix --prefix-tokens 40 --tail-tokens 3 --requests 3 --rounds 2 --seed 7 --json"
    assert main([*words.split(), "--checkpoint", str(checkpoint)]) == 0
    told = json.loads(capfd.readouterr().out)
    assert (told["seed"], told["requests"], len(told["place_ms"])) == (7, 3, 3)
    assert min(told["first_ms"], told["following_ms"], told["following_over_first"], told["alone_ms"]) > 0
    assert told["beginning_over_first"] == pytest.approx((told["place_ms"][1] - told["alone_ms"]) / told["first_ms"], abs=1e-3)
    with up(checkpoint) as running:
        assert main([*words.split(), "--target", running.grpc]) == 0
        assert json.loads(capfd.readouterr().out).keys() == told.keys()
        assert main([*words.split(), "--target", running.grpc, "--prefix-tokens", "5000"]) == 1
        assert "error: prompt" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("words", "named"),
    [("--target nowhere", "target"), ("--target h:1 --requests 1", "requests"), ("--target h:1 --rounds 0", "rounds")],
)
def test_bad_settings_of_prefix(capsys: pytest.CaptureFixture[str], words: str, named: str) -> None:
    assert main(f"bench prefix {words}".split()) == 1
    assert f"error: {named}: " in capsys.readouterr().err


def test_transport(capsys: pytest.CaptureFixture[str]) -> None:
    """At the real size, between two processes."""
    assert main(["bench", "transport", "--tokens", "16", "--rounds", "1", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["delta_bytes_real_size"] == delta_bytes()
    assert told["snapshot_bytes_real_size"] == snapshot_bytes(16)
    for kind in ("grpc", "shm", "dist"):
        assert min(told[kind][key] for key in ("snapshot_ms", "delta_ms", "gb_per_s")) > 0


@pytest.mark.parametrize(("words", "named"), [("--rate 0", "rate"), ("--rounds 0", "rounds"), ("--max-tokens 0", "max_tokens")])
def test_bad_settings(checkpoint: Path, capsys: pytest.CaptureFixture[str], words: str, named: str) -> None:
    assert main(f"bench serving --checkpoint {checkpoint} {words}".split()) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert named in error


def test_soak(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = "bench soak --minutes 0.05 --concurrency 4 --prompts 4 --max-tokens 40 --prompt-tokens 9 --json --checkpoint"
    assert main([*words.split(), str(checkpoint)]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["wrong"], told["failed"]) == (0, 0)
    assert told["requests"] > 0
    assert told["memory_mb"].keys() == {"context-0", "denoiser-0", "gateway"}
    assert all(mb > 1 for mb in told["memory_mb"].values())
