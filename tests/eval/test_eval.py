"""The evaluation's arithmetic, and a whole run on a tiny checkpoint (whose text is noise: nothing is solved)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.checkpoints import write_tiny_checkpoint
from tests.support.tokenizers import VOCAB_SIZE, write_byte_tokenizer
from twotower.cli.main import main
from twotower.engine.batch import Completion
from twotower.errors import CheckpointError, ConfigError, InvalidArgument
from twotower.eval.config import EvalConfig
from twotower.eval.measure import Comparison, Evaluation, Score, Settings
from twotower.request import GenerationParams, Mode
from twotower.train.families.answers import NumberCheck


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"), vocab_size=VOCAB_SIZE)
    write_byte_tokenizer(path)
    return path


def _completion(tokens: int, forwards: int, seconds: float) -> Completion:
    return Completion(0, list(range(tokens)), forwards=forwards, blocks=1, first_block_s=seconds / 2, seconds=seconds)


def test_scores() -> None:
    ar, diffusion = Score(seconds=4.0), Score(seconds=1.0)
    for score, forwards in ((ar, 40), (diffusion, 10)):
        score.add(_completion(40, forwards, 0.5), "so 2 + 3 = 5.\nThe answer is 5.", NumberCheck(5), 0)
        score.add(_completion(40, forwards, 1.5), "The answer is 6.", NumberCheck(5), 1)
    diffusion.add(_completion(40, 10, 1.0), "7 7 7 7 7 7 7 7 7 7 The answer is 5.", NumberCheck(5), 2)  # right, and degenerate
    assert (ar.accuracy, diffusion.accuracy, diffusion.degenerate) == (1 / 2, 1 / 3, 1)
    speculative = Score(seconds=2.0, rounds=4, accepted=36)
    speculative.add(_completion(40, 4, 0.5), "The answer is 5.", NumberCheck(5), 0)
    settings = Settings(1, False), Settings(2, True), Settings(2, False)
    comparison = Comparison(1, ar, diffusion, speculative, *settings)
    assert comparison.speculative_speedup == pytest.approx((40 / 2.0) / (80 / 4.0))
    assert speculative.tokens_per_round == pytest.approx(10.0)
    assert comparison.retention == pytest.approx(2 / 3)
    assert comparison.speedup == pytest.approx((120 / 1.0) / (80 / 4.0))
    assert diffusion.tokens_per_forward == pytest.approx(4.0)
    told = ar.as_json()
    assert told["latency_p50_s"] == pytest.approx(1.0)
    assert told["latency_p95_s"] == pytest.approx(1.45)


def test_json(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = f"eval --checkpoint {checkpoint} --problems 3 --batch 1 2 --max-tokens 20 --compile no --json"
    assert main(words.split()) == 0
    told = json.loads(capsys.readouterr().out)
    assert {"ar", "diffusion", "speculative", "retention", "speedup", "batch", "batches", "settings"} <= told.keys()
    assert told["ar"]["tokens_per_forward"] == 1.0
    assert told["diffusion"]["tokens_per_s"] > 0
    assert told["speculative"]["accuracy"] == told["ar"]["accuracy"]
    assert [other["batch"] for other in told["batches"]] == [2]


def test_sweep_writes_a_table_and_a_picture(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = f"eval --checkpoint {checkpoint} --problems 2 --max-tokens 20 --compile no --threads 1 --sweep --out {tmp_path}"
    assert main(words.split()) == 0
    lines = (tmp_path / "sweep.md").read_text().splitlines()
    assert sum(line.startswith("| gamma") for line in lines) == 6
    assert sum(line.startswith("| block_size") for line in lines) == 5
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_the_same_problems_for_a_seed_and_others_for_another(checkpoint: Path) -> None:
    first, again, other = (Evaluation(EvalConfig(checkpoint, seed=seed, problems=3)).problems for seed in (1, 1, 2))
    assert first == again != other


def test_bad_settings(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="problems"):
        EvalConfig(checkpoint, problems=0)
    with pytest.raises(ConfigError, match="batch"):
        EvalConfig(checkpoint, batches=(0,))
    with pytest.raises(InvalidArgument, match="gamma"):
        Evaluation(EvalConfig(checkpoint, problems=1, params=GenerationParams(gamma=2.0)))
    with pytest.raises(CheckpointError, match="tokenizer"):
        Evaluation(EvalConfig(write_tiny_checkpoint(tmp_path), problems=1))


def test_the_fastest_settings_are_found_once_for_each_mode(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluation = Evaluation(EvalConfig(checkpoint, problems=1, params=GenerationParams(max_tokens=4)))
    evaluation._threads = (1, 2)
    asked: list[tuple[Mode, Settings]] = []

    def seconds(mode: Mode, batch: int, settings: Settings) -> float:
        asked.append((mode, settings))
        return 1.0 - 0.1 * settings.compiled - (0.2 if mode is Mode.DIFFUSION else -0.2) * settings.threads

    monkeypatch.setattr(evaluation, "_time", seconds)
    assert evaluation.tune(Mode.AR, 1) == Settings(1, True)
    assert evaluation.tune(Mode.DIFFUSION, 1) == Settings(2, True)
    assert evaluation.tune(Mode.DIFFUSION, 4) == Settings(2, False)  # graphs are for single requests
    count = len(asked)
    assert evaluation.tune(Mode.AR, 1) == Settings(1, True)
    assert len(asked) == count
