"""The suite's statistics, and a whole run on a tiny checkpoint."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from tests.support.checkpoints import write_tiny_checkpoint
from tests.support.tokenizers import VOCAB_SIZE, write_byte_tokenizer
from twotower.cli.main import main
from twotower.errors import ConfigError
from twotower.eval.config import EvalConfig
from twotower.eval.suite import retained, wilson


def test_wilson_intervals() -> None:
    low, high = wilson(0.5, 100)
    assert (low, high) == (pytest.approx(0.404, abs=1e-3), pytest.approx(0.596, abs=1e-3))
    assert wilson(1.0, 50)[1] == 1.0
    assert wilson(1.0, 50)[0] == pytest.approx(0.929, abs=1e-3)
    assert wilson(0.0, 50)[0] == 0.0


def test_what_is_retained_is_drawn_within_families_and_in_pairs() -> None:
    same = [[(True, True)] * 30 + [(False, False)] * 10] * 2
    assert retained(same, 0) == (1.0, 1.0)  # whatever is drawn, both modes solve the same problems
    low, high = retained([[(True, True)] * 90 + [(True, False)] * 10], 0)
    assert 0.82 < low < 0.88 < 0.92 < high < 0.97
    assert all(map(math.isnan, retained([[(False, True)] * 5], 0)))


def test_a_row_for_each_family_and_the_overall(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = write_tiny_checkpoint(tmp_path / "tiny", vocab_size=VOCAB_SIZE)
    write_byte_tokenizer(checkpoint)
    words = f"eval --checkpoint {checkpoint} --problems 2 --batch 2 --max-tokens 8 --compile no --threads 1 --suite --json"
    assert main([*words.split(), "--out", str(tmp_path / "out")]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [(row["family"], row["batch"], row["problems"]) for row in rows] == [
        ("math", 2, 2),
        ("code", 2, 2),
        ("knowledge", 2, 2),
        ("overall", 2, 6),
    ]
    assert all(row["ar"] == 0.0 and row["retention"] is None for row in rows)  # noise solves nothing
    assert len((tmp_path / "out/suite.md").read_text().splitlines()) == 2 + 4


def test_bad_families_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="family"):
        EvalConfig(tmp_path, family="poems")
    assert main(["eval", "--suite", "--sweep"]) == 1
    assert "suite" in capsys.readouterr().err
