"""Logprobs against a computation from scratch: each token's, in the forward that committed it, whatever is in the batch."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.checkpoints import write_tiny_checkpoint
from twotower.engine.local import LocalEngine
from twotower.engine.logprobs import token_logprobs
from twotower.engine.refinement import Refinement
from twotower.request import GenerationParams, Mode, TokenLogprob
from twotower_kernels.unmask import Unmasked, unmask

PROMPT = [5, 9, 14, 7]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def engine(path: Path) -> LocalEngine:
    return LocalEngine(path, threads=1)


def expect(told: TokenLogprob, logits: Tensor, token: int, top: int, excluded: int | None = None) -> None:
    """logits (V,): log softmax in fp64 over all ids but the excluded one."""
    ids = torch.tensor([i for i in range(len(logits)) if i != excluded])
    logprobs = logits[ids].double().log_softmax(-1)
    by_id = dict(zip(ids.tolist(), logprobs.tolist(), strict=True))
    assert told.logprob == pytest.approx(by_id[token], abs=1e-4)
    likeliest = sorted(by_id, key=lambda i: -by_id[i])[:top]
    assert [i for i, _ in told.top] == likeliest
    assert [logprob for _, logprob in told.top] == pytest.approx([by_id[i] for i in likeliest], abs=1e-4)


def test_a_row_at_a_time() -> None:
    logits = torch.randn(7, 50, generator=torch.Generator().manual_seed(0)) * 4
    tokens = torch.arange(7)
    before = logits.clone()
    for top in range(6):
        for row, told in enumerate(token_logprobs(logits, tokens, top, excluded=20)):
            expect(told, logits[row], row, top, excluded=20)
    assert torch.equal(logits, before)


def test_of_equal_ones_the_lower_id_comes_first() -> None:
    """As in what is committed: argmax takes the first. Of 50 equal ones, topk takes others."""
    logits = torch.zeros(1, 50)
    logits[0, 30] = 1.0
    (told,) = token_logprobs(logits, torch.tensor([30]), 4, excluded=1)
    assert [token for token, _ in told.top] == [30, 0, 2, 3]


def test_large_logits_stay_finite() -> None:
    (told,) = token_logprobs(torch.tensor([[3e4, -3e4, 2.9e4]]), torch.tensor([1]), 2)
    assert told == TokenLogprob(-6e4, ((0, 0.0), (2, -1e3)))


REQUESTS = [
    ([5], GenerationParams(gamma=0.1, logprobs=2)),
    ([6, 7, 8], GenerationParams(gamma=1.0, steps=5)),
    (list(range(4, 60)), GenerationParams(gamma=0.3, temperature=0.9, seed=5, logprobs=5)),
    ([9, 9], GenerationParams(block_size=8, steps=8, gamma=0.5, logprobs=0)),
    ([10], GenerationParams(gamma=0.3, temperature=0.9, seed=6, top_k=3)),
    ([11, 12], GenerationParams(gamma=1.0, steps=4, temperature=2.0, seed=7, logprobs=1)),
]


def start(engine: LocalEngine) -> list[Refinement]:
    blocks = []
    for prompt, params in REQUESTS:
        session = engine.context.open("test", prompt, params)
        engine.context.prefill(session, len(prompt))
        blocks.append(engine.denoiser.start(params, session.state, 0))
    return blocks


@pytest.mark.parametrize("overwrites", [True, False])
def test_of_the_forward_that_committed_the_token(
    engine: LocalEngine, monkeypatch: pytest.MonkeyPatch, overwrites: bool
) -> None:
    """Blocks that share forwards, each against its own logits, computed alone; some do not ask.

    overwrites: whether unmasking leaves -inf at the mask id in the logits, as plain torch does, or only reads, as Triton.
    """

    def only_reads(logits: Tensor, *arguments: Any, **options: Any) -> Unmasked:
        return unmask(logits.clone(), *arguments, **options)

    if not overwrites:
        kernels = type("OnlyReads", (type(engine.denoiser.tower.kernels),), {"unmask": staticmethod(only_reads)})
        monkeypatch.setitem(vars(engine.denoiser.tower), "kernels", kernels())
    blocks, mask_id, steps, compared = start(engine), engine.denoiser.mask_id, 0, 0
    while running := [block for block in blocks if not block.done]:
        before = []
        for block in running:
            share = torch.tensor([block.masked_share])
            logits = engine.denoiser.tower.denoise(block.tokens[None], share, [block.state])[0]
            before.append((block.masked, logits.clone()))
        engine.denoiser.step(running)
        steps += 1
        for block, (masked, logits) in zip(running, before, strict=True):
            top = block.params.logprobs
            if top is None:
                assert block.logprobs == ()
                continue
            committed = (~block.masked).nonzero().flatten().tolist()
            assert len(block.logprobs) == len(committed)
            for position, told in zip(committed, block.logprobs, strict=True):
                if masked[position]:  # committed by this forward
                    expect(told, logits[position], int(block.tokens[position]), top, excluded=mask_id)
                    compared += 1
    assert steps > 5
    assert compared == 16 + 16 + 8 + 16


def test_the_mask_id_matters_here(engine: LocalEngine) -> None:
    """The checks above would fail if it were not excluded."""
    (block, *_) = start(engine)
    logits = engine.denoiser.tower.denoise(block.tokens[None], torch.ones(1), [block.state])[0]
    assert logits.double().softmax(-1)[:, engine.denoiser.mask_id].max() > 1e-3


def test_neighbours_and_asking_change_nothing(engine: LocalEngine) -> None:
    together, alone = start(engine), start(engine)
    while running := [block for block in together if not block.done]:
        engine.denoiser.step(running)
    for block in alone:
        while not block.done:
            engine.denoiser.step([block])
    for a, b in zip(together, alone, strict=True):
        assert a.tokens.tolist() == b.tokens.tolist()
        assert [told.logprob for told in a.logprobs] == pytest.approx([told.logprob for told in b.logprobs], abs=1e-4)
    for prompt, params in REQUESTS:
        quiet, asking = (engine.generate(prompt, dataclasses.replace(params, logprobs=n)) for n in (None, 5))
        assert (quiet.token_ids, quiet.forwards) == (asking.token_ids, asking.forwards)


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_ar(engine: LocalEngine, temperature: float) -> None:
    """Against a context that reads everything anew for each token."""
    params = GenerationParams(mode=Mode.AR, max_tokens=12, temperature=temperature, seed=3, logprobs=3)
    known = list(PROMPT)
    for block in engine.blocks(PROMPT, params):
        session = engine.context.open("test", list(known), params)
        engine.context.prefill(session, len(known))
        assert session.logits is not None
        (token,), (told,) = block.token_ids, block.logprobs
        expect(told, session.logits, token, 3)
        known.append(token)
    assert len(known) == len(PROMPT) + 12


def test_ar_rows_that_ask_and_rows_that_do_not(engine: LocalEngine) -> None:
    params = [
        GenerationParams(mode=Mode.AR, max_tokens=8, temperature=0.5, seed=i, logprobs=n) for i, n in enumerate((2, None, 0))
    ]
    sessions = [engine.context.open(str(i), [6 + i], p) for i, p in enumerate(params)]
    for session in sessions:
        engine.context.prefill(session, 1)
    written: list[list[TokenLogprob]] = [[], [], []]
    for _ in range(8):
        for session, told, token in zip(sessions, written, engine.context.decode(sessions), strict=True):
            assert isinstance(token, int)
            session.emit([token])
            told += session.logprobs
    for i, told in enumerate(written):
        alone = [entry for block in engine.blocks([6 + i], params[i]) for entry in block.logprobs]
        assert [entry.logprob for entry in told] == pytest.approx([entry.logprob for entry in alone], abs=1e-4)
        assert [[t for t, _ in entry.top] for entry in told] == [[t for t, _ in entry.top] for entry in alone]
    assert [len(told) for told in written] == [8, 0, 8]


@pytest.mark.parametrize("mode", list(Mode))
def test_one_for_each_token_that_is_shown(engine: LocalEngine, mode: Mode) -> None:
    params = GenerationParams(mode=mode, max_tokens=20, gamma=0.2, logprobs=1)
    for changed in (params, dataclasses.replace(params, eos_token_ids=(engine.generate(PROMPT, params).token_ids[5],))):
        blocks = list(engine.blocks(PROMPT, changed))
        assert all(len(block.logprobs) == len(block.token_ids) for block in blocks)
        greedy = [
            (token, told.logprob) == told.top[0] for b in blocks for token, told in zip(b.token_ids, b.logprobs, strict=True)
        ]
        assert all(greedy)
    assert all(block.logprobs == () for block in engine.blocks(PROMPT, dataclasses.replace(params, logprobs=None)))


def test_the_same_seed_gives_the_same_bits(engine: LocalEngine) -> None:
    params = GenerationParams(max_tokens=32, temperature=1.2, seed=9, logprobs=5)
    first, second = ([block.logprobs for block in engine.blocks(PROMPT, params)] for _ in range(2))
    assert first == second
