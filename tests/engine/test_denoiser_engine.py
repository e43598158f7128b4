"""Blocks of different sessions in one forward: none sees another."""

from __future__ import annotations

import pytest
import torch

from tests.support.checkpoints import write_tiny_checkpoint
from twotower.engine.local import LocalEngine
from twotower.engine.refinement import Refinement
from twotower.request import GenerationParams


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> LocalEngine:
    return LocalEngine(write_tiny_checkpoint(tmp_path_factory.mktemp("tiny")), threads=1)


REQUESTS = [
    ([5], GenerationParams(gamma=0.1)),
    ([6, 7, 8], GenerationParams(gamma=1.0, steps=3)),
    (list(range(4, 60)), GenerationParams(gamma=0.3, temperature=0.9, seed=5)),
    ([9, 9], GenerationParams(block_size=8, steps=8, gamma=0.5)),
    ([10], GenerationParams(gamma=0.3, temperature=0.9, seed=6)),
]


def _start(engine: LocalEngine) -> list[Refinement]:
    blocks = []
    for prompt, params in REQUESTS:
        session = engine.context.open("test", prompt, params)
        engine.context.prefill(session, len(prompt))
        blocks.append(engine.denoiser.start(params, session.state, 0))
    return blocks


def test_joining_and_leaving_between_forwards_changes_nothing(engine: LocalEngine) -> None:
    alone = _start(engine)
    for block in alone:
        while not block.done:
            engine.denoiser.step([block])
    together: list[Refinement] = []
    waiting = _start(engine)
    everyone = list(waiting)
    while waiting or together:
        if waiting:
            together.append(waiting.pop(0))  # one joins each forward
        engine.denoiser.step(together)
        together = [block for block in together if not block.done]
    for a, b in zip(alone, everyone, strict=True):
        assert a.tokens.tolist() == b.tokens.tolist()
        assert a.forwards == b.forwards


def test_a_failing_row_leaves_its_neighbours(engine: LocalEngine) -> None:
    good, bad = _start(engine)[:2]
    reference = _start(engine)[0]
    engine.denoiser.step([reference])
    for mamba in bad.state.mamba.values():
        mamba.ssm.fill_(torch.nan)
    engine.denoiser.step([good, bad])
    assert bad.error is not None
    assert bad.done
    assert good.error is None
    assert good.tokens.tolist() == reference.tokens.tolist()
