"""`twotower quantize`, and `--experts` where generation runs in this process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.checkpoints import write_tiny_checkpoint
from tests.support.tokenizers import VOCAB_SIZE, write_byte_tokenizer
from twotower.cli.main import main
from twotower.model.checkpoint import Checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"), vocab_size=VOCAB_SIZE)
    write_byte_tokenizer(path)
    return path


def test_writes_and_reports(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = f"quantize {checkpoint} --experts fp4 --out {tmp_path / 'out'} --report --problems 3 --max-tokens 20 --json"
    assert main(words.split()) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["identity"] == Checkpoint.open(tmp_path / "out").identity
    assert told["after"] < told["before"]
    layers = told["report"]["layers"]
    assert [(each["tower"], each["layer"]) for each in layers] == [(t, i) for t in ("context", "denoiser") for i in (1, 6)]
    assert all(0.05 < each["weights"]["mean"] < 0.15 for each in layers)
    assert all(0 < each["outputs"]["mean"] <= each["outputs"]["max"] for each in layers)
    assert [each["mode"] for each in told["report"]["agreements"]] == ["diffusion", "ar"]
    assert all(0 <= each["equal_tokens"] <= 1 for each in told["report"]["agreements"])


def test_one_tower_alone_leaves_the_other_as_it_is(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = f"quantize {checkpoint} --experts fp4 --tower denoiser --report --problems 2 --max-tokens 20 --json"
    assert main(words.split()) == 0
    report = json.loads(capsys.readouterr().out)["report"]
    assert {each["tower"] for each in report["layers"]} == {"denoiser"}
    ar = report["agreements"][1]
    assert ar["equal_tokens"] == ar["equal_generations"] == 1.0  # no denoiser has a part in it


def test_generate_with_quantized_experts(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(f"quantize {checkpoint} --experts fp8 --out {tmp_path / 'out'}".split()) == 0
    capsys.readouterr()
    tokens = []
    for which in (f"--checkpoint {checkpoint} --experts fp8", f"--checkpoint {tmp_path / 'out'}"):
        ids = ["--prompt-ids", "5 6 7", "--max-tokens", "40", "--no-eos", "--gamma", "0.05", "--json", "--threads", "1"]
        assert main(["generate", "--local", *which.split(), *ids]) == 0
        tokens.append(json.loads(capsys.readouterr().out)["token_ids"])
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize(
    ("words", "named"),
    [("--experts fp8", "out"), ("--experts fp8 --report --problems 0", "problems"), ("--experts fp8 --out {out}", "out")],
)
def test_bad_options(checkpoint: Path, capsys: pytest.CaptureFixture[str], words: str, named: str) -> None:
    assert main(["quantize", str(checkpoint), *words.format(out=checkpoint).split()]) == 1
    assert capsys.readouterr().err.startswith(f"error: {named}")
