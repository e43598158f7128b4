"""Many requests in one process: the same tokens as one by one."""

from __future__ import annotations

import pytest

from tests.support.checkpoints import write_tiny_checkpoint
from twotower.engine.batch import generate_batch
from twotower.engine.local import LocalEngine
from twotower.errors import InvalidArgument
from twotower.request import GenerationParams, Mode

PROMPTS = [[5], [6, 7, 8], list(range(4, 60)), [9, 9], [10, 4], [3, 3, 3]]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> LocalEngine:
    return LocalEngine(write_tiny_checkpoint(tmp_path_factory.mktemp("tiny")), threads=1)


@pytest.mark.parametrize("mode", [Mode.AR, Mode.DIFFUSION])
@pytest.mark.parametrize("batch", [1, 2, 4, 16])
def test_batches_equal_one_by_one(engine: LocalEngine, mode: Mode, batch: int) -> None:
    params = GenerationParams(mode=mode, max_tokens=40, gamma=0.3, temperature=0.7, seed=3, eos_token_ids=(11,))
    results = list(generate_batch(engine.context, engine.denoiser, PROMPTS, params, batch))
    assert sorted(result.index for result in results) == list(range(len(PROMPTS)))
    for result in results:
        alone = engine.generate(PROMPTS[result.index], params)
        assert result.token_ids == alone.token_ids
        assert (result.forwards, result.blocks, result.finish_reason) == (alone.forwards, alone.blocks, alone.finish_reason)
        assert 0 < result.first_block_s <= result.seconds


def test_mock_ar_is_refused(engine: LocalEngine) -> None:
    with pytest.raises(InvalidArgument, match="mode"):
        list(generate_batch(engine.context, engine.denoiser, PROMPTS, GenerationParams(mode=Mode.MOCK_AR), 2))
