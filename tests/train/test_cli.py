"""From a corpus of one's own to a checkpoint that generates, by the commands alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from twotower.cli.main import main
from twotower.engine.local import LocalEngine
from twotower.errors import CheckpointError
from twotower.request import GenerationParams
from twotower.train import pipeline, run
from twotower.train.start import SHAPES

from .conftest import TINY


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "stories", TINY)
    monkeypatch.setitem(SHAPES, "suite", TINY)


def test_corpus_tokenizer_context_denoiser(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def train(*words: str) -> None:
        assert main(["train", *words]) == 0, capfd.readouterr().err

    corpus, tokenizer = str(tmp_path / "texts.jsonl"), str(tmp_path / "tokenizer.json")
    train("corpus", "--out", corpus, "--count", "40")
    train("tokenizer", "--corpus", corpus, "--vocab-size", "300", "--out", tokenizer)
    short = ("--steps", "2", "--threads", "1", "--corpus", corpus, "--run-dir")
    train("context", "--tokenizer", tokenizer, "--out", str(tmp_path / "context"), *short, str(tmp_path / "run1"))
    more = ("--init", str(tmp_path / "context"), "--muon-lr", "0.01")
    train("context", "--tokenizer", tokenizer, "--out", str(tmp_path / "context"), *more, *short, str(tmp_path / "run1b"))
    denoiser = ("denoiser", "--context", str(tmp_path / "context"))
    train(*denoiser, "--out", str(tmp_path / "both"), *short, str(tmp_path / "run2"))
    train(*denoiser, "--out", str(tmp_path / "unsure"), "--head-scale", "0.5", *short, str(tmp_path / "run3"))

    assert json.loads((tmp_path / "both/config.json").read_text())["vocab_size"] == 300
    sure, unsure = (load_file(tmp_path / name / "model.safetensors") for name in ("both", "unsure"))
    assert [name for name in sure if not torch.equal(sure[name], unsure[name])] == ["lm_head.weight"]
    assert torch.equal(sure["lm_head.weight"] * 0.5, unsure["lm_head.weight"])
    engine = LocalEngine(tmp_path / "both", threads=1)
    assert len(engine.generate([5, 6, 7], GenerationParams(max_tokens=20)).token_ids) == 20


def test_everything_at_once_goes_on_where_it_was_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "SUITE_POOLS", 1)
    monkeypatch.setattr(pipeline, "PROBED_CPU", 2)
    monkeypatch.setattr(run, "POOL_SIZE", 100)
    words = ["train", "all", "--steps", "4", "--threads", "1", "--pool-size", "60", "--rows", "4", "--fp32"]
    paths = ["--out", str(tmp_path / "both"), "--run-dir", str(tmp_path / "run")]
    run_denoiser = run.train_denoiser

    def interrupted(*_: object, **__: object) -> None:
        raise CheckpointError("interrupted")

    monkeypatch.setattr(pipeline, "train_denoiser", interrupted)
    assert main([*words, *paths]) == 1
    context = load_file(tmp_path / "run/context/model.safetensors")
    monkeypatch.setattr(pipeline, "train_denoiser", run_denoiser)
    assert main([*words, *paths]) == 0, capfd.readouterr().err
    both = load_file(tmp_path / "both/model.safetensors")
    assert all(torch.equal(both[name], tensor) for name, tensor in context.items())
    shown = capfd.readouterr().err
    assert shown.count("tokenizer: from the built-in tasks") == 1
    for line in ("AR, math:", "AR, code:", "AR, knowledge:", "diffusion, block 32, knowledge:", "calibration: head scale"):
        assert line in shown
    assert "not measured" not in shown
    assert json.loads((tmp_path / "both/tokenizer_config.json").read_text())["eos_token"] == "<eos>"
    assert LocalEngine(tmp_path / "both", threads=1).generate([5, 6, 7], GenerationParams(max_tokens=9)).token_ids


def test_missing_tokenizer_is_one_clear_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--tokenizer", str(tmp_path / "none.json"), "--out", str(tmp_path / "o"), "--run-dir", str(tmp_path / "r")]
    assert main(["train", "context", *words]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: tokenizer ")
    assert "none.json does not exist" in error
