"""Log probabilities of prompts: those that the same tower gives tokens it writes itself, whatever shares the forward."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.support.checkpoints import write_tiny_checkpoint
from twotower.engine import scoring as module
from twotower.engine.local import LocalEngine
from twotower.engine.scoring import PromptScorer, Scoring
from twotower.errors import NonFiniteLogits, TwoTowerError, Unavailable
from twotower.model.checkpoint import Checkpoint
from twotower.model.context_tower import ContextTower
from twotower.model.pool import PoolSize, StatePool
from twotower.model.state import ContextState
from twotower.model.weights import load_context_tower
from twotower.request import GenerationParams, Mode, TokenLogprob

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.fixture
def tower(checkpoint: Path) -> ContextTower:
    return load_context_tower(Checkpoint.open(checkpoint), torch.float32, CPU)


class Told:
    """What a prompt's scoring has told."""

    def __init__(self) -> None:
        self.logprobs: list[TokenLogprob] = []
        self.error: TwoTowerError | None = None

    def __call__(self, told: Sequence[TokenLogprob] | TwoTowerError) -> None:
        if isinstance(told, TwoTowerError):
            self.error = told
        else:
            assert self.error is None
            self.logprobs += told


def run(scorer: PromptScorer) -> int:
    steps = 0
    while len(scorer):
        scorer.step()
        steps += 1
        assert steps < 1000
    return steps


def score(tower: ContextTower, prompts: Sequence[Sequence[int]], top: int = 2, chunk: int = 16, budget: int = 40) -> list[Told]:
    scorer, all_told = PromptScorer(tower, chunk=chunk, budget=budget), []
    for i, prompt in enumerate(prompts):
        all_told.append(Told())
        scorer.begin(Scoring(str(i), prompt, top, tower.new_state(), all_told[-1]))
    run(scorer)
    return all_told


def close_to(told: Sequence[TokenLogprob], expected: Sequence[TokenLogprob]) -> None:
    assert [one.logprob for one in told] == pytest.approx([one.logprob for one in expected], abs=1e-4)
    for one, other in zip(told, expected, strict=True):
        assert [i for i, _ in one.top] == [i for i, _ in other.top]
        assert [v for _, v in one.top] == pytest.approx([v for _, v in other.top], abs=1e-4)


def test_they_are_those_of_ar_generation(checkpoint: Path, tower: ContextTower) -> None:
    local = LocalEngine(checkpoint, threads=1)
    params = GenerationParams(Mode.AR, 50, temperature=1.0, seed=3, logprobs=2)
    blocks = list(local.blocks([5, 6, 7], params))
    text = [token for block in blocks for token in block.token_ids]
    expected = [one for block in blocks for one in block.logprobs]
    (told,) = score(tower, [[5, 6, 7, *text]])
    assert len(told.logprobs) == 52
    close_to(told.logprobs[2:], expected)


def test_chunks_and_neighbours_change_nothing(tower: ContextTower, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [[(7 * i * (p + 1)) % 96 for i in range(1, length + 1)] for p, length in enumerate((1, 2, 16, 17, 50, 33))]
    together = score(tower, prompts)
    monkeypatch.setattr(module, "ROWS", 5)
    for prompt, told in zip(prompts, together, strict=True):
        assert len(told.logprobs) == len(prompt) - 1
        (alone,) = score(tower, [prompt], chunk=1000)
        close_to(told.logprobs, alone.logprobs)


def test_a_forward_is_bounded(tower: ContextTower, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[list[int]] = []
    read = tower.read

    def noting(chunks: Sequence[Tensor], states: Sequence[ContextState]) -> Tensor:
        sizes.append([len(chunk) for chunk in chunks])
        return read(chunks, states)

    monkeypatch.setattr(tower, "read", noting)
    score(tower, [[5] * 50] * 5, chunk=16, budget=40)
    assert max(map(sum, sizes)) <= 40 + 16
    assert max(max(chunks) for chunks in sizes) == 16
    assert sum(map(sum, sizes)) == 250


def test_who_fails_alone_fails_alone(tower: ContextTower, monkeypatch: pytest.MonkeyPatch) -> None:
    read = tower.read

    def failing(chunks: Sequence[Tensor], states: Sequence[ContextState]) -> Tensor:
        if any(66 in chunk.tolist() for chunk in chunks):
            raise RuntimeError("no")
        return read(chunks, states)

    prompts = [[5] * 40, [6] * 20 + [66], [7] * 30]
    expected = score(tower, prompts)
    monkeypatch.setattr(tower, "read", failing)
    told = score(tower, prompts)
    assert isinstance(told[1].error, Unavailable)
    for i in (0, 2):
        assert told[i].error is None
        close_to(told[i].logprobs, expected[i].logprobs)  # each once, though they began again


def test_logits_that_are_not_finite_fail_their_prompt(tower: ContextTower, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tower, "logits", lambda h: torch.full((len(h), 96), torch.nan))
    (told,) = score(tower, [[5, 6, 7]])
    assert isinstance(told.error, NonFiniteLogits)


def test_whoever_leaves_or_ends_gives_its_state_back(tower: ContextTower) -> None:
    pool = StatePool(tower.config, torch.float32, CPU, PoolSize(2, 4))
    scorer = PromptScorer(tower, chunk=16, budget=16)
    states = [pool.acquire(64) for _ in range(2)]
    for name, state in zip("ab", states, strict=True):
        scorer.begin(Scoring(name, [5] * 20, 0, state, Told()))
    assert scorer.step() == []
    assert scorer.leave("b") is states[1]
    assert scorer.leave("b") is None
    assert scorer.step() == [states[0]]
    assert len(scorer) == 0
    assert scorer.step() == []
