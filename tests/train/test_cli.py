"""From a corpus of one's own to a checkpoint that generates, by the commands alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from twotower.cli.main import main
from twotower.engine.local import LocalEngine
from twotower.request import GenerationParams
from twotower.train import run

from .conftest import TINY


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "SHIPPED", TINY)


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


def test_missing_tokenizer_is_one_clear_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--tokenizer", str(tmp_path / "none.json"), "--out", str(tmp_path / "o"), "--run-dir", str(tmp_path / "r")]
    assert main(["train", "context", *words]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: tokenizer ")
    assert "none.json does not exist" in error
