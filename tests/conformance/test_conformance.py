"""The reference's outputs, token for token, and that a miss is noticed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.support.checkpoints import write_tiny_checkpoint
from tests.support.vectors import write_cases
from twotower.cli.main import main
from twotower.conformance.run import run_local
from twotower.conformance.vectors import load_cases
from twotower.errors import InvalidArgument


def test_the_reference_in_one_process(hybrid_8l: Path) -> None:
    misses: list[str] = []
    tally = run_local(hybrid_8l, misses.append)
    assert misses == []
    assert str(tally) == "43/43 cases, 23/23 states"


@pytest.mark.parametrize("options", ["--denoisers 1", "--denoisers 3 --contexts 2 --concurrency 8"])
def test_the_reference_through_services(hybrid_8l: Path, options: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["conformance", str(hybrid_8l), "--services", *options.split()]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "38/38 cases, 0/0 states"


def test_several_sets_are_added_up(hybrid_8l: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_cases(write_tiny_checkpoint(tmp_path))
    assert main(["conformance", str(tmp_path), str(hybrid_8l), "--local"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "62/62 cases, 23/23 states"


def test_a_wrong_token_a_wrong_count_and_a_wrong_state_are_misses(
    hybrid_8l: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "set"
    shutil.copytree(hybrid_8l, path)
    cases = json.loads((path / "cases.json").read_text())
    cases[0]["output_ids"][3] ^= 1
    cases[2]["nfe"] += 1
    cases[3]["output_ids"].pop()
    (path / "cases.json").write_text(json.dumps(cases))
    states = load_file(path / "states.safetensors")
    states["commit.2.ssm"][0, 0, 0, 0] += 1e-3
    states["prefill.3.k"] = states["prefill.3.k"][:, :, 1:].contiguous()
    save_file(states, path / "states.safetensors")
    assert main(["conformance", str(path), "--local"]) == 1
    *lines, last = capsys.readouterr().out.splitlines()
    assert last == "39/43 cases, 21/23 states"
    assert any("case 0" in line and "from token 3" in line for line in lines)
    assert any("case 2" in line and "forwards" in line for line in lines)
    assert any("commit.2.ssm" in line for line in lines)


def test_an_expected_output_is_cut_at_its_end_of_sequence(hybrid_8l: Path) -> None:
    case = next(case for case in load_cases(hybrid_8l) if case.params.eos_token_ids == (101,))
    assert case.token_ids[-1] == 101
    assert case.token_ids.count(101) == 1


@pytest.mark.parametrize("content", [None, "", "{}", "[{}]", '[{"mode": "magic"}]'])
def test_what_is_no_set_of_cases(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "cases.json").write_text(content)
    with pytest.raises(InvalidArgument, match=r"cases\.json"):
        load_cases(tmp_path)
