"""Generation in one process: ends, cuts, seeds, and what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.checkpoints import write_tiny_checkpoint
from twotower.engine.local import Generation, LocalEngine
from twotower.errors import InvalidArgument, NonFiniteLogits
from twotower.request import FinishReason, GenerationParams, Mode

PROMPT = [5, 9, 14, 7]
PARAMS = GenerationParams(max_tokens=40, gamma=0.2)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> LocalEngine:
    return LocalEngine(write_tiny_checkpoint(tmp_path_factory.mktemp("tiny")), threads=1)


def _run(engine: LocalEngine, prompt: list[int] = PROMPT, **changes: Any) -> Generation:
    return engine.generate(prompt, dataclasses.replace(PARAMS, **changes))


def test_the_last_block_is_cut(engine: LocalEngine) -> None:
    result = _run(engine)
    blocks = [block.token_ids for block in engine.blocks(PROMPT, PARAMS)]
    assert [len(block) for block in blocks] == [16, 16, 8]
    assert [token for block in blocks for token in block] == result.token_ids
    assert result.finish_reason is FinishReason.LENGTH
    assert result.blocks == 3
    whole = _run(engine, max_tokens=48)
    assert whole.token_ids[:40] == result.token_ids


@pytest.mark.parametrize("mode", list(Mode))
@pytest.mark.parametrize("prompt", [[5], [2], [3, 3, 3], PROMPT])
def test_any_prompt_in_any_mode(engine: LocalEngine, mode: Mode, prompt: list[int]) -> None:
    """Prompts of one token work, and token id 3 is an ordinary token there."""
    result = _run(engine, prompt, mode=mode, max_tokens=20)
    assert len(result.token_ids) == 20
    assert result.blocks <= 20
    drafts = result.blocks if mode is Mode.SPECULATIVE else 0  # whatever each of them takes
    assert 20 + PARAMS.steps * drafts >= result.forwards >= 2


@pytest.mark.parametrize("mode", list(Mode))
def test_generation_ends_after_the_first_eos(engine: LocalEngine, mode: Mode) -> None:
    free = _run(engine, mode=mode)
    eos = free.token_ids[5]
    first = free.token_ids.index(eos)
    ended = _run(engine, mode=mode, eos_token_ids=(eos,))
    assert ended.token_ids == free.token_ids[: first + 1]
    assert ended.finish_reason is FinishReason.STOP


def test_one_token(engine: LocalEngine) -> None:
    for mode in Mode:
        assert len(_run(engine, mode=mode, max_tokens=1).token_ids) == 1


def test_steps_bound_the_forwards(engine: LocalEngine) -> None:
    for steps in (1, 4, 16, 50):
        result = _run(engine, steps=steps, gamma=1.0, max_tokens=32)
        assert result.forwards == 2 * min(steps, 16)
    assert _run(engine, gamma=0.0, max_tokens=32).forwards == 2


def test_seeds(engine: LocalEngine) -> None:
    for mode in (Mode.AR, Mode.DIFFUSION):
        runs = [_run(engine, mode=mode, temperature=1.5, seed=seed).token_ids for seed in (1, 1, 2)]
        assert runs[0] == runs[1] != runs[2]


def test_the_likeliest_token_alone_is_the_greedy_one(engine: LocalEngine) -> None:
    for mode in (Mode.AR, Mode.DIFFUSION):
        greedy = _run(engine, mode=mode)
        for only in ({"top_k": 1}, {"top_p": 1e-9}):
            assert _run(engine, mode=mode, temperature=5.0, **only).token_ids == greedy.token_ids
        assert _run(engine, mode=mode, temperature=5.0, top_k=2).token_ids != greedy.token_ids


def test_a_long_prompt_in_chunks_gives_the_same_tokens(engine: LocalEngine, tmp_path: Path) -> None:
    chunked = LocalEngine(engine.checkpoint.path, threads=1, prefill_chunk=7)
    prompt = torch.randint(4, 96, (100,), generator=torch.Generator().manual_seed(0)).tolist()
    assert chunked.generate(prompt, PARAMS).token_ids == engine.generate(prompt, PARAMS).token_ids


@pytest.mark.parametrize(
    ("prompt", "changes", "field"),
    [
        ([], {}, "prompt"),
        ([96], {}, "prompt"),
        ([-1], {}, "prompt"),
        (PROMPT, {"max_tokens": 0}, "max_tokens"),
        (PROMPT, {"max_tokens": 4093}, "max_tokens"),
        (PROMPT, {"block_size": 0}, "block_size"),
        (PROMPT, {"block_size": -16}, "block_size"),
        (PROMPT, {"block_size": 257}, "block_size"),
        (PROMPT, {"steps": 0}, "steps"),
        (PROMPT, {"gamma": 1.01}, "gamma"),
        (PROMPT, {"gamma": -0.1}, "gamma"),
        (PROMPT, {"gamma": float("nan")}, "gamma"),
        (PROMPT, {"temperature": -1.0}, "temperature"),
        (PROMPT, {"temperature": float("inf")}, "temperature"),
        (PROMPT, {"top_k": -1}, "top_k"),
        (PROMPT, {"top_p": 0.0}, "top_p"),
        (PROMPT, {"top_p": 1.5}, "top_p"),
        (PROMPT, {"top_p": float("nan")}, "top_p"),
        (PROMPT, {"seed": -1}, "seed"),
        (PROMPT, {"eos_token_ids": (96,)}, "eos_token_ids"),
        (PROMPT, {"eos_token_ids": (2,) * 65}, "eos_token_ids"),
        (PROMPT, {"logprobs": -1}, "logprobs"),
        (PROMPT, {"logprobs": 6}, "logprobs"),
    ],
)
def test_bad_input_names_the_field(engine: LocalEngine, prompt: list[int], changes: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidArgument, match=f"^{field}: ") as caught:
        _run(engine, prompt, **changes)
    assert caught.value.field == field


def test_blocks_of_other_sizes(engine: LocalEngine) -> None:
    for size in (1, 2, 8, 32, 40):
        result = _run(engine, block_size=size, steps=size)
        assert len(result.token_ids) == 40


def test_a_block_costs_no_more_than_what_the_request_can_use(engine: LocalEngine) -> None:
    """One of 256 positions for one token would take hundreds of forwards, of which nobody sees anything."""
    with pytest.raises(InvalidArgument, match="block_size: must be at most 40 with max_tokens 40"):
        _run(engine, block_size=256, steps=256)


def test_not_a_number_fails_the_request(tmp_path: Path) -> None:
    engine = LocalEngine(write_tiny_checkpoint(tmp_path), threads=1)
    for head, mode in ((engine.denoiser.tower.lm_head, Mode.DIFFUSION), (engine.context.tower.context_lm_head, Mode.AR)):
        head.weight[7].fill_(float("nan"))
        with pytest.raises(NonFiniteLogits):
            engine.generate(PROMPT, dataclasses.replace(PARAMS, mode=mode))
