"""The context's loop alone, an iteration at a time: what shares a forward, and whose state it is at each border."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeVar

import pytest
import torch

from tests.support.checkpoints import write_tiny_checkpoint
from tests.support.loops import CHUNK, TinyTowers
from twotower.context.loop import ContextLoop
from twotower.context.messages import (
    CloseSession,
    CommitBlocks,
    Committed,
    ContextResult,
    CopyState,
    OpenSession,
    SessionFailed,
    SetPaused,
    StateCopied,
    StateSoonReady,
    TokenDecoded,
)
from twotower.engine.context_engine import ContextEngine
from twotower.engine.isolation import MAX_FAILURES
from twotower.engine.session import Piece, Session
from twotower.errors import Overloaded, Unavailable
from twotower.model.state import ContextState
from twotower.request import GenerationParams, Mode, Priority
from twotower.wire.state import state_tensors

R = TypeVar("R", bound=ContextResult)

BLOCK = list(range(5, 21))
PARAMS = GenerationParams(max_tokens=64)
PROMPT = [(7 * i) % 90 + 4 for i in range(40)]


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> TinyTowers:
    return TinyTowers(write_tiny_checkpoint(tmp_path_factory.mktemp("tiny")))


class _Context:
    def __init__(self, towers: TinyTowers, *, slots: int = 8, **options: Any) -> None:
        self.results: list[ContextResult] = []
        self.pool = towers.pool(slots)
        self.loop: ContextLoop = towers.context_loop(self.results.extend, self.pool, **options)

    def open(self, name: str, tokens: Sequence[int] = PROMPT, params: GenerationParams = PARAMS, generated: int = 0) -> None:
        self.loop.inbox.put(OpenSession(name, tokens, generated, params, Priority.NORMAL))

    def until_idle(self) -> None:
        for _ in range(200):
            before = len(self.results)
            self.loop.iterate()
            if not self.loop._ahead and len(self.results) == before:
                return
        raise AssertionError("the loop does not come to rest")

    def take(self, kind: type[R]) -> list[R]:
        """Results of a kind that have come since the last call."""
        own: list[R] = [result for result in self.results if isinstance(result, kind)]
        self.results = [result for result in self.results if not isinstance(result, kind)]
        self.loop._take = self.results.extend
        return own

    def state(self, name: str) -> ContextState:
        return self.loop._residents[name].session.state


def _same_bits(context: _Context, name: str, session: Session) -> bool:
    rates = context.loop._engine.decay_rates
    theirs = dict(state_tensors(session.state, rates))
    return all(torch.equal(tensor, theirs[key]) for key, tensor in state_tensors(context.state(name), rates))


def _close(context: _Context, name: str, session: Session) -> bool:
    """Equal but for what plain torch rounds otherwise in another batch."""
    rates = context.loop._engine.decay_rates
    theirs = dict(state_tensors(session.state, rates))
    ours = dict(state_tensors(context.state(name), rates))
    return all(torch.allclose(tensor, theirs[key], rtol=1e-4, atol=1e-5) for key, tensor in ours.items())


def test_blocks_of_one_message_share_a_forward(towers: TinyTowers) -> None:
    context = _Context(towers)
    for name in "abc":
        context.open(name)
    context.until_idle()
    context.take(Committed)
    context.loop.inbox.put(CommitBlocks([(name, Piece(BLOCK, 16)) for name in "abc"]))
    context.loop.iterate()
    (committed,) = context.take(Committed)
    assert sorted(committed.session_ids) == ["a", "b", "c"]
    assert list(committed.lengths) == [len(PROMPT) + 16] * 3
    assert committed.deltas.length == 16


def test_what_a_session_has_read_and_written_is_what_it_is_alone(towers: TinyTowers) -> None:
    context = _Context(towers)
    prompts = {name: PROMPT[i:] for i, name in enumerate("abcd")}
    for name, prompt in prompts.items():
        context.open(name, prompt)
    context.until_idle()
    context.loop.inbox.put(CommitBlocks([(name, Piece(BLOCK[::-1], 16)) for name in "bd"]))
    context.until_idle()
    engine = ContextEngine(towers.context)
    for name, prompt in prompts.items():
        alone = engine.open(name, prompt, PARAMS)
        while alone.prefill_left:
            engine.prefill(alone, CHUNK)
        if name in "bd":
            engine.commit([(alone, BLOCK[::-1])])
        assert context.state(name).length == alone.state.length
        assert _close(context, name, alone)


def test_what_was_written_elsewhere_is_taken_in_as_it_was_written(towers: TinyTowers) -> None:
    """The same bits as where it was written: not those of a longer prompt."""
    context, engine = _Context(towers), ContextEngine(towers.context)
    context.open("moved", [*PROMPT, *BLOCK, *BLOCK[::-1]], generated=32)
    context.until_idle()
    alone = engine.open("alone", PROMPT, PARAMS)
    while alone.prefill_left:
        engine.prefill(alone, CHUNK)
    for block in (BLOCK, BLOCK[::-1]):
        engine.commit([(alone, block)])
    assert _same_bits(context, "moved", alone)
    assert len(context.take(StateSoonReady)) == 1


def test_an_ar_session_goes_on_elsewhere_with_the_same_bits(towers: TinyTowers) -> None:
    params = GenerationParams(mode=Mode.AR, max_tokens=12, temperature=0.9, seed=3)
    first, second = _Context(towers), _Context(towers)
    first.open("whole", params=params)
    first.until_idle()
    tokens = [result.token for result in first.take(TokenDecoded)]
    assert len(tokens) == 12
    second.open("moved", [*PROMPT, *tokens[:5]], params, generated=5)
    second.until_idle()
    assert [result.token for result in second.take(TokenDecoded)] == tokens[5:]
    for name, tensor in dict(state_tensors(first.state("whole"), {0: torch.ones(1)} | first.loop._engine.decay_rates)).items():
        assert torch.equal(tensor, dict(state_tensors(second.state("moved"), second.loop._engine.decay_rates))[name])


def test_a_paused_ar_session_writes_nothing(towers: TinyTowers) -> None:
    context = _Context(towers)
    context.open("a", params=GenerationParams(mode=Mode.AR, max_tokens=30))
    while len([r for r in context.results if isinstance(r, TokenDecoded)]) < 3:
        context.loop.iterate()
    context.loop.inbox.put(SetPaused("a", True))
    context.until_idle()
    written = len(context.take(TokenDecoded))
    context.loop.inbox.put(SetPaused("a", False))
    context.until_idle()
    assert written + len(context.take(TokenDecoded)) == 30


def test_a_slot_is_never_read_or_written_for_a_session_that_has_left(
    towers: TinyTowers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything that can be planned for a session is planned; it leaves, and another one has its place at once."""
    context = _Context(towers, slots=2)
    other = [(11 * i + 5) % 90 + 4 for i in range(40)]
    for leaves in range(1, 6):  # after so many iterations
        context.open("leaves", PROMPT)
        context.open("stays", other)
        for _ in range(leaves):
            context.loop.iterate()
        if leaves > 2:
            context.loop.inbox.put(CommitBlocks([("leaves", Piece(BLOCK, 16))]), CopyState("leaves", 1))
        context.loop.inbox.put(CloseSession("leaves"))
        context.open("next", other[::-1])
        context.loop.inbox.put(CommitBlocks([("leaves", Piece(BLOCK, 16))]), CopyState("leaves", 1))
        context.take(StateCopied)
        context.until_idle()
        assert not context.take(StateCopied)
        engine = ContextEngine(towers.context)
        for name, prompt in (("stays", other), ("next", other[::-1])):
            alone = engine.open(name, prompt, PARAMS)
            while alone.prefill_left:
                engine.prefill(alone, CHUNK)
            assert _close(context, name, alone)
        context.loop.inbox.put(CloseSession("stays"), CloseSession("next"), CloseSession("leaves"))
        context.until_idle()
        assert context.pool.used_slots == context.pool.used_pages == 0


def test_a_state_is_copied_when_nothing_is_left_to_do_to_it(towers: TinyTowers) -> None:
    context = _Context(towers)
    context.open("a")
    context.loop.inbox.put(CopyState("a", 7))
    context.loop.iterate()
    assert not context.take(StateCopied)
    context.until_idle()
    (copied,) = context.take(StateCopied)
    assert (copied.lease, copied.length) == (7, len(PROMPT))
    context.loop.inbox.put(CommitBlocks([("a", Piece(BLOCK, 16))]), CopyState("a", 8))
    context.until_idle()
    (copied,) = context.take(StateCopied)
    assert copied.length == len(PROMPT) + 16
    before = {key: tensor.clone() for key, tensor in copied.copy.tensors.items()}
    context.loop.inbox.put(CommitBlocks([("a", Piece(BLOCK, 16))]))
    context.until_idle()
    assert all(torch.equal(tensor, before[key]) for key, tensor in copied.copy.tensors.items())


def test_who_does_not_fit_waits_within_bounds(towers: TinyTowers) -> None:
    context = _Context(towers, slots=1, max_waiting=1)
    for name in "abc":
        context.open(name)
    context.until_idle()
    (refused,) = context.take(SessionFailed)
    assert refused.session_id == "c"
    assert isinstance(refused.error, Overloaded)
    assert context.loop.waiting == 1
    context.loop.inbox.put(CloseSession("a"))
    context.until_idle()
    assert list(context.loop._residents) == ["b"]


@pytest.mark.parametrize("bad", ["a", "c"])
def test_only_the_session_that_fails_alone_fails(towers: TinyTowers, bad: str, monkeypatch: pytest.MonkeyPatch) -> None:
    context, engine = _Context(towers), ContextEngine(towers.context)
    commit = context.loop._engine.commit_together

    def poisoned(work: Sequence[tuple[Session, Sequence[int]]]) -> Any:
        if any(session.id == bad for session, _ in work):
            raise RuntimeError("device-side assert")
        return commit(work)

    monkeypatch.setattr(context.loop._engine, "commit_together", poisoned)
    for name in "abcde":
        context.open(name)
    context.until_idle()
    context.loop.inbox.put(CommitBlocks([(name, Piece(BLOCK, 16)) for name in "abcde"]))
    context.until_idle()
    (failed,) = context.take(SessionFailed)
    assert failed.session_id == bad
    assert isinstance(failed.error, Unavailable)
    assert context.pool.used_slots == 4
    alone = engine.open("alone", PROMPT, PARAMS)
    while alone.prefill_left:
        engine.prefill(alone, CHUNK)
    engine.commit([(alone, BLOCK)])
    assert all(_close(context, name, alone) for name in "abcde" if name != bad)


def test_a_prompt_that_fails_is_found_among_those_read_with_it(towers: TinyTowers, monkeypatch: pytest.MonkeyPatch) -> None:
    context, engine = _Context(towers), ContextEngine(towers.context)
    read, times = context.loop._engine.read, 0

    def poisoned(chunks: Sequence[tuple[Session, int]]) -> None:
        nonlocal times
        if any(session.id == "b" and session.state.length >= CHUNK for session, _ in chunks):
            times += 1
            for session, _ in chunks:
                for layer in session.state.mamba.values():
                    layer.ssm.add_(1.0)  # as a forward that fails half-way leaves it
            raise RuntimeError("out of memory")
        read(chunks)

    for name in "abc":
        context.open(name)
    monkeypatch.setattr(context.loop._engine, "read", poisoned)
    context.until_idle()
    (failed,) = context.take(SessionFailed)
    assert failed.session_id == "b"
    assert times == 2
    alone = engine.open("alone", PROMPT, PARAMS)
    while alone.prefill_left:
        engine.prefill(alone, CHUNK)
    assert _close(context, "a", alone)
    assert _close(context, "c", alone)


def test_an_ar_session_that_fails_is_found_and_the_others_go_on_with_the_same_tokens(
    towers: TinyTowers, monkeypatch: pytest.MonkeyPatch
) -> None:
    def params(seed: int) -> GenerationParams:
        return GenerationParams(mode=Mode.AR, max_tokens=12, temperature=0.9, seed=seed)

    calm, context = _Context(towers), _Context(towers)
    for one in (calm, context):
        for seed in range(4):
            one.open(str(seed), PROMPT[seed:], params(seed))
    calm.until_idle()
    decode = context.loop._engine.decode

    def poisoned(sessions: Sequence[Session]) -> Any:
        if any(session.id == "2" and session.generated == 5 for session in sessions):
            for session in sessions:
                for layer in session.state.mamba.values():
                    layer.ssm.add_(1.0)  # as a forward that fails half-way leaves it
            raise RuntimeError("out of memory")
        return decode(sessions)

    monkeypatch.setattr(context.loop._engine, "decode", poisoned)
    context.until_idle()
    assert [failed.session_id for failed in context.take(SessionFailed)] == ["2"]
    tokens, expected = context.take(TokenDecoded), calm.take(TokenDecoded)
    for name in "013":
        assert [t.token for t in tokens if t.session_id == name] == [t.token for t in expected if t.session_id == name]


def test_a_device_that_fails_session_after_session_ends_the_loop(towers: TinyTowers, monkeypatch: pytest.MonkeyPatch) -> None:
    context = _Context(towers)

    def broken(chunks: object) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(context.loop._engine, "read", broken)
    for i in range(MAX_FAILURES):
        context.open(str(i))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        context.until_idle()


@pytest.mark.parametrize("mode", [Mode.AR, Mode.SPECULATIVE])
def test_a_draw_that_fails_lets_each_session_begin_again_with_its_text(
    towers: TinyTowers, monkeypatch: pytest.MonkeyPatch, mode: Mode
) -> None:
    """The forward has taken the tokens into the states by then; the memory for the draw is what is missing."""
    params = GenerationParams(max_tokens=12, mode=mode)
    texts = []
    for fails in (False, True):
        context = _Context(towers)
        draw, calls = context.loop._engine._draw, 0

        def draw_or_fail(sessions: Sequence[Session], draw: Any = draw, fails: bool = fails) -> Any:
            nonlocal calls
            calls += 1
            if fails and calls == 4:
                raise RuntimeError("out of memory")
            return draw(sessions)

        monkeypatch.setattr(context.loop._engine, "_draw", draw_or_fail)
        for name in ("a", "b"):
            context.open(name, PROMPT[: 20 + ord(name) % 2], params)
        context.until_idle()
        tokens = context.take(TokenDecoded)
        texts.append([[one.token for one in tokens if one.session_id == name] for name in ("a", "b")])
        assert not context.take(SessionFailed)
    assert texts[0] == texts[1]
    assert [len(text) for text in texts[0]] == [12, 12]


@pytest.mark.parametrize("mode", [Mode.DIFFUSION, Mode.SPECULATIVE])
def test_states_that_a_failing_commit_has_changed_are_given_up_and_not_committed_again(
    towers: TinyTowers, monkeypatch: pytest.MonkeyPatch, mode: Mode
) -> None:
    """Nobody knows how far it came: their gateways have them rebuilt. Others go on."""
    context = _Context(towers)
    for name in "abc":
        context.open(name, params=dataclasses.replace(PARAMS, mode=mode))
    context.loop.inbox.put(CopyState("a", 1), CopyState("b", 1))
    for _ in range(8):
        context.loop.iterate()
    tower, left = context.loop._engine.tower, ["accept", "accept_all"]
    for name in left.copy():

        def fail_late(*args: Any, name: str = name, real: Any = getattr(tower, name)) -> Any:  # noqa: B008
            changed = real(*args)
            if left:
                left.clear()
                raise RuntimeError("out of memory")
            return changed

        monkeypatch.setattr(tower, name, fail_late)
    pieces = []
    for name in "ab":
        pending = context.loop._residents[name].session.pending
        pieces.append((name, Piece(BLOCK, 16) if pending is None else Piece([pending, *BLOCK[1:]], None)))
    context.loop.inbox.put(CommitBlocks(pieces))
    context.until_idle()
    assert {failed.session_id for failed in context.take(SessionFailed)} == {"a", "b"}
    assert not context.take(Committed)
    assert set(context.loop._residents) == {"c"}
