"""Speculative mode in one process: AR's text, token for token, whatever the drafts are."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from tests.support.checkpoints import write_tiny_checkpoint
from tests.support.loops import FixedTimes
from twotower.cli.options import DEFAULT_CHECKPOINT
from twotower.engine.batch import generate_batch
from twotower.engine.context_engine import ContextEngine, Round
from twotower.engine.local import LocalEngine, WrittenBlock
from twotower.engine.session import STEP, Piece, Session
from twotower.errors import InvalidArgument, NonFiniteLogits
from twotower.model.delta_batch import apply_batch
from twotower.model.partial import Verified
from twotower.model.pool import PoolSize, StatePool
from twotower.model.state import ContextState
from twotower.request import GenerationParams, Mode
from twotower.text.tokenizer import Tokenizer
from twotower.train.families.stories.problems import problems
from twotower_kernels.cpu.build import load

PROMPTS = [[5], [6, 7, 8], list(range(4, 60)), [9, 9], [10, 4], [3, 3, 3]]
AR = GenerationParams(mode=Mode.AR, max_tokens=20, eos_token_ids=(11,))
SPECULATIVE = dataclasses.replace(AR, mode=Mode.SPECULATIVE)
NEEDS_KERNELS = pytest.mark.skipif(load() is None, reason="no AVX-512 BF16, or no compiler")
DRAWN = {"temperature": 0.8, "seed": 3}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> LocalEngine:
    return LocalEngine(write_tiny_checkpoint(tmp_path_factory.mktemp("tiny")), threads=1)


@pytest.fixture(scope="module")
def shipped() -> LocalEngine:
    return LocalEngine(DEFAULT_CHECKPOINT, dtype="float32", threads=1)


@pytest.mark.parametrize("changes", [{}, DRAWN, {**DRAWN, "top_k": 5}, {**DRAWN, "top_p": 0.7}, {"block_size": 5}])
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_random_drafts_leave_ars_text(engine: LocalEngine, steps: int, changes: dict[str, float]) -> None:
    for prompt in PROMPTS[:3]:
        expected = engine.generate(prompt, dataclasses.replace(AR, **changes))  # type: ignore[arg-type]
        got = engine.generate(prompt, dataclasses.replace(SPECULATIVE, steps=steps, **changes))  # type: ignore[arg-type]
        assert (got.token_ids, got.finish_reason) == (expected.token_ids, expected.finish_reason)


@pytest.mark.parametrize("changes", [{}, DRAWN])
def test_good_drafts_are_kept(shipped: LocalEngine, changes: dict[str, float]) -> None:
    path = shipped.checkpoint.tokenizer_path
    assert path is not None
    prompt = Tokenizer.load(path).encode(next(iter(problems("eval", 5))).question)
    limits = {"max_tokens": 48, "eos_token_ids": (), **changes}
    expected = shipped.generate(prompt, dataclasses.replace(AR, **limits))  # type: ignore[arg-type]
    blocks = list(shipped.blocks(prompt, dataclasses.replace(SPECULATIVE, steps=1, **limits)))  # type: ignore[arg-type]
    assert [token for block in blocks for token in block.token_ids] == expected.token_ids
    rounds = blocks[1:]
    assert (blocks[0].forwards, blocks[0].use.context_forwards) == (0, 0)  # the prompt's reading gave the first token
    assert all((block.forwards, block.use.drafted, block.use.context_forwards) == (1, 15, 1) for block in rounds)
    assert all(len(block.token_ids) == block.use.accepted + 1 for block in rounds[:-1])
    assert sum(block.use.accepted for block in rounds) > len(rounds)


@pytest.mark.parametrize("changes", [{}, DRAWN])
@pytest.mark.parametrize("batch", [1, 4])
def test_batches_equal_ar(engine: LocalEngine, monkeypatch: pytest.MonkeyPatch, batch: int, changes: dict[str, float]) -> None:
    monkeypatch.setattr(engine.context, "times", FixedTimes(token=1.0, commit=1.0, step=0.1))
    params = dataclasses.replace(SPECULATIVE, steps=0, **changes)  # type: ignore[arg-type]
    for result in generate_batch(engine.context, engine.denoiser, PROMPTS, params, batch):
        alone = engine.generate(PROMPTS[result.index], dataclasses.replace(AR, **changes))  # type: ignore[arg-type]
        assert (result.token_ids, result.finish_reason) == (alone.token_ids, alone.finish_reason)
        assert result.use.context_forwards >= result.rounds  # which may be none, as measured times decide


@pytest.mark.parametrize("changes", [{}, DRAWN])
def test_log_probabilities_are_ars(engine: LocalEngine, changes: dict[str, float]) -> None:
    def told(params: GenerationParams) -> list[WrittenBlock]:
        return list(engine.blocks([6, 7, 8], dataclasses.replace(params, logprobs=2, **changes)))  # type: ignore[arg-type]

    expected = [logprob for block in told(AR) for logprob in block.logprobs]
    got = [logprob for block in told(dataclasses.replace(SPECULATIVE, steps=1)) for logprob in block.logprobs]
    assert len(got) == len(expected)
    for mine, theirs in zip(got, expected, strict=True):
        assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-4)
        assert [token for token, _ in mine.top] == [token for token, _ in theirs.top]


def test_a_draft_has_at_least_two_tokens(engine: LocalEngine) -> None:
    with pytest.raises(InvalidArgument, match="block_size"):
        engine.generate([5], dataclasses.replace(SPECULATIVE, block_size=1))


def _opened(context: ContextEngine, params: GenerationParams, states: Sequence[ContextState | None]) -> list[Session]:
    """Sessions that have drawn their first token."""
    sessions = []
    for i, state in enumerate(states):
        session = context.open(str(i), PROMPTS[i], params, state=state)
        while session.prefill_left:
            context.prefill(session, 128)
        sessions.append(session)
    for session, token in zip(sessions, context.decode(sessions), strict=True):
        assert isinstance(token, int)
        session.emit([token])
    return sessions


def _texts(engine: LocalEngine, params: GenerationParams) -> list[list[int]]:
    return [engine.generate(prompt, dataclasses.replace(params, mode=Mode.AR, max_tokens=80)).token_ids for prompt in PROMPTS]


@pytest.mark.parametrize("changes", [{}, DRAWN])
def test_a_round_keeps_what_agrees_and_commits_of_all_modes_share_a_forward(
    engine: LocalEngine, changes: dict[str, float]
) -> None:
    context = engine.context
    params = dataclasses.replace(SPECULATIVE, max_tokens=80, eos_token_ids=(), **changes)  # type: ignore[arg-type]
    texts = _texts(engine, params)
    pools = [StatePool(context.tower.config, torch.float32, torch.device("cpu"), PoolSize(6, 24)) for _ in range(2)]
    sessions = _opened(context, params, [pools[0].acquire(160) for _ in PROMPTS[:4]])
    other = context.open("diffusion", [5, 6], GenerationParams(), state=pools[0].acquire(100))
    context.prefill(other, 2)
    copies = [pools[1].acquire(160) for _ in range(5)]
    for copy, session in zip(copies, [*sessions, other], strict=True):
        copy.length = session.state.length
        for i, layer in session.state.mamba.items():
            copy.mamba[i].conv.copy_(layer.conv)
            copy.mamba[i].ssm.copy_(layer.ssm)
        for i, kv in session.state.kv.items():
            copy.kv[i].write(0, *kv.slice(0, copy.length))
    for right in ([1, 2, 9, 16], [16, 5, 1, 3]):
        work = []
        for session, count, text in zip(sessions, right, texts, strict=False):
            draft = text[session.generated - 1 :][:16]
            if count < 16:
                draft[count] = (draft[count] + 1) % 90
            work.append((session, Piece(draft, None)))
        deltas, rounds = context.advance([*work, (other, Piece(list(range(20, 36)), 16))])
        assert rounds[-1] is None
        for session, count, text, round_ in zip(sessions, right, texts, rounds, strict=False):
            assert isinstance(round_, Round)
            assert len(round_.tokens) == count
            session.emit(round_.tokens)
            assert session.written == text[: session.generated]
            assert session.pending == session.written[-1]
            assert session.state.length == len(session.prompt) + session.generated - 1
        assert deltas.counts == (*right, 16)
        apply_batch(copies, deltas, context.decay_rates)
        for copy, session in zip(copies, [*sessions, other], strict=True):
            _same(copy, session.state)
    assert sessions[0].rounds == [1, 16]


@pytest.mark.parametrize("spoilt", [0, 1, 7, 15])
def test_logits_that_are_not_finite_end_the_text_where_ar_ends(
    engine: LocalEngine, monkeypatch: pytest.MonkeyPatch, spoilt: int
) -> None:
    """Those before them become text, and what would have come behind the end does no harm."""
    context = engine.context
    params = dataclasses.replace(SPECULATIVE, max_tokens=80, eos_token_ids=())
    text = _texts(engine, params)[0]
    (session,) = _opened(context, params, [None])
    verify = context.tower.verify

    def spoil(*args: Any, **kwargs: Any) -> Verified:
        verified = verify(*args, **kwargs)
        assert verified.logits is not None
        verified.logits[0, spoilt, 7] = torch.nan
        return verified

    monkeypatch.setattr(context.tower, "verify", spoil)
    before = session.state.length
    _, (round_,) = context.advance([(session, Piece(text[:16], None))])
    assert round_ is not None
    if spoilt == 0:
        assert isinstance(round_.error, NonFiniteLogits)
        return
    assert round_.error is None
    assert round_.tokens == text[1 : spoilt + 1]
    assert session.pending == text[spoilt]
    assert session.state.length == before + spoilt


def test_a_draft_that_does_not_begin_with_the_token_that_is_due_is_refused(engine: LocalEngine) -> None:
    (session,) = _opened(engine.context, SPECULATIVE, [None])
    assert session.pending is not None
    with pytest.raises(AssertionError, match="due"):
        engine.context.advance([(session, Piece([session.pending + 1] * 16, None))])


@pytest.mark.parametrize("exact", [False, pytest.param(True, marks=NEEDS_KERNELS)])
def test_a_state_is_rebuilt_by_the_forwards_that_made_it(engine: LocalEngine, exact: bool) -> None:
    """Rounds and AR steps, in the order in which they came; and the text goes on as it would have.

    To the bit by the C++ kernels. In plain torch the sums of a forward depend on how many of its tokens an expert has, refused
    ones too, which are forgotten.
    """
    engine = LocalEngine(DEFAULT_CHECKPOINT, threads=1) if exact else engine
    context = engine.context
    params = dataclasses.replace(SPECULATIVE, max_tokens=80, eos_token_ids=())
    text = _texts(engine, params)[0]
    (session,) = _opened(context, params, [None])
    for count in (3, STEP, 16, 1, STEP):
        if count == STEP:
            (token,) = context.decode([session])
            assert isinstance(token, int)
            session.emit([token])
        else:
            draft = [*text[session.generated - 1 :][:count], *[7] * 16][:16]
            _, (round_,) = context.advance([(session, Piece(draft, None))])
            assert round_ is not None
            session.emit(round_.tokens)
    again = context.open("again", [*session.prompt, *session.written], params, session.generated, rounds=session.rounds)
    context.prefill(again, 128)
    while again.blocks:
        context.advance([(again, again.blocks.popleft())])
    _same(again.state, session.state, exact=exact)
    assert (again.pending, again.generated, again.rounds) == (session.pending, session.generated, session.rounds)
    assert context.decode([again]) == context.decode([session]) == [text[session.generated]]


@NEEDS_KERNELS
def test_in_bf16_a_round_has_the_bits_of_ar_steps() -> None:
    """By the C++ kernels: so no draw can ever fall otherwise."""
    context = LocalEngine(DEFAULT_CHECKPOINT, threads=1).context
    params = dataclasses.replace(SPECULATIVE, max_tokens=80, eos_token_ids=(), temperature=1.5, seed=1)
    (session,), (stepped,) = _opened(context, params, [None]), _opened(context, params, [None])
    for count in (16, 3, 9):
        for _ in range(count):
            (token,) = context.decode([stepped])
            assert isinstance(token, int)
            stepped.emit([token])
        draft = [*stepped.written[session.generated - 1 :][:count], *[7] * 16][:16]
        _, (round_,) = context.advance([(session, Piece(draft, None))])
        assert round_ is not None
        assert round_.tokens == stepped.written[session.generated :]
        session.emit(round_.tokens)
        _same(session.state, stepped.state)


def _same(a: ContextState, b: ContextState, *, exact: bool = True) -> None:
    assert a.length == b.length
    pairs = [
        pair
        for i, layer in a.mamba.items()
        for pair in ((layer.conv[:, 1:], b.mamba[i].conv[:, 1:]), (layer.ssm, b.mamba[i].ssm))
    ]
    for i, kv in a.kv.items():
        pairs += zip(kv.slice(0, a.length), b.kv[i].slice(0, b.length), strict=True)
    for mine, theirs in pairs:
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0 if exact else 1e-5 * theirs.abs().max().item())
