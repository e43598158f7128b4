"""The denoiser's loop alone, a forward at a time: blocks join, leave and fail between forwards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import pytest
import torch

from tests.support.checkpoints import write_tiny_checkpoint
from tests.support.loops import TinyTowers
from twotower.denoiser.loop import DenoiserLoop
from twotower.denoiser.messages import (
    Begin,
    BlocksFinished,
    DenoiserResult,
    Extend,
    Held,
    Leave,
    Row,
    SessionsFailed,
    SlotsFree,
    TensorsRead,
)
from twotower.engine.context_engine import ContextEngine
from twotower.engine.denoiser_engine import DenoiserEngine
from twotower.engine.isolation import MAX_FAILURES
from twotower.engine.refinement import Refinement
from twotower.engine.session import Session
from twotower.errors import Incompatible, NonFiniteLogits
from twotower.request import GenerationParams
from twotower.transport.interface import Received
from twotower.wire.state import delta_tensors, state_tensors

R = TypeVar("R", bound=DenoiserResult)

PARAMS = [
    GenerationParams(gamma=0.1),
    GenerationParams(gamma=1.0, steps=3),
    GenerationParams(gamma=0.3, temperature=0.9, seed=5),
    GenerationParams(block_size=8, steps=8, gamma=0.5),
]
SLOW = GenerationParams(gamma=1.0)


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> TinyTowers:
    return TinyTowers(write_tiny_checkpoint(tmp_path_factory.mktemp("tiny")))


class _Denoiser:
    """A loop, and a context's engine beside it."""

    def __init__(self, towers: TinyTowers, slots: int = 8) -> None:
        self.results: list[DenoiserResult] = []
        self.pool = towers.pool(slots)
        self.loop: DenoiserLoop = towers.denoiser_loop(lambda results: self.results.extend(results), self.pool)
        self.context = ContextEngine(towers.context)
        self.sessions: dict[Held, Session] = {}
        self.released = 0

    def received(self, tensors: Sequence[tuple[Any, torch.Tensor]]) -> Received:
        def release() -> None:
            self.released += 1

        return Received({key: tensor.clone() for key, tensor in tensors}, 0, release)

    def begin(self, name: str, params: GenerationParams = PARAMS[0], context: str = "a:1", room: int = 64) -> Held:
        held = Held(name, 1)
        session = self.sessions[held] = self.context.open(name, [5, 6, 7], params)
        self.context.prefill(session, 3)
        state = self.received(list(state_tensors(session.state, self.context.decay_rates)))
        self.loop.inbox.put(Begin(held, context, params, room, 3, 0, state))
        return held

    def extend(self, *finished: tuple[Held, Refinement], length: int = 0) -> None:
        """Commit blocks, and let the loop know. length: to be claimed instead of the true one."""
        work = [(self.sessions[held], block.tokens.tolist()) for held, block in finished]
        deltas = self.context.commit_together(work)
        rows = []
        for held, block in finished:
            session = self.sessions[held]
            session.emit(block.tokens.tolist())
            rows.append(Row(held, length or session.state.length, session.generated, len(block.tokens)))
        self.loop.inbox.put(Extend(rows, deltas.length, self.received(delta_tensors(deltas))))

    def until(self, kind: type[R], count: int = 1) -> list[R]:
        """Iterate until there are `count` results of a kind; takes them."""
        for _ in range(400):
            own: list[R] = [result for result in self.results if isinstance(result, kind)]
            if len(own) >= count:
                self.results = [result for result in self.results if not isinstance(result, kind)]
                return own
            self.loop.iterate()
        raise AssertionError(f"no {kind.__name__}")

    def finished(self, count: int) -> dict[Held, Refinement]:
        """The blocks that have been finished, once there are `count`."""
        blocks: dict[Held, Refinement] = {}
        while len(blocks) < count:
            for result in self.until(BlocksFinished):
                blocks |= dict(result.blocks)
        return blocks


def _alone(towers: TinyTowers, params: GenerationParams) -> Refinement:
    context, denoiser = ContextEngine(towers.context), DenoiserEngine(towers.denoiser)
    session = context.open("alone", [5, 6, 7], params)
    context.prefill(session, 3)
    block = denoiser.start(params, session.state, 0)
    while not block.done:
        denoiser.step([block])
    return block


def test_blocks_side_by_side_equal_blocks_alone(towers: TinyTowers) -> None:
    denoiser = _Denoiser(towers)
    held = [denoiser.begin(str(i), params) for i, params in enumerate(PARAMS)]
    blocks = denoiser.finished(len(PARAMS))
    for one, params in zip(held, PARAMS, strict=True):
        alone = _alone(towers, params)
        assert blocks[one].tokens.tolist() == alone.tokens.tolist()
        assert blocks[one].forwards == alone.forwards


def test_what_one_forward_finished_is_one_message_for_each_context(towers: TinyTowers) -> None:
    denoiser = _Denoiser(towers)
    params = GenerationParams(gamma=1.0, steps=3)
    for name, context in (("1", "a:1"), ("2", "b:1"), ("3", "a:1")):
        denoiser.begin(name, params, context)
    denoiser.begin("4", GenerationParams(gamma=1.0, steps=5), "a:1")
    first = denoiser.until(BlocksFinished, 2)
    assert {(each.context, tuple(held.session_id for held, _ in each.blocks)) for each in first} == {
        ("a:1", ("1", "3")),
        ("b:1", ("2",)),
    }
    (last,) = denoiser.until(BlocksFinished)
    assert [held.session_id for held, _ in last.blocks] == ["4"]


def test_a_commit_extends_all_its_sessions_that_are_still_here(towers: TinyTowers) -> None:
    denoiser = _Denoiser(towers)
    held = [denoiser.begin(str(i), PARAMS[0]) for i in range(3)]
    blocks = denoiser.finished(3)
    denoiser.loop.inbox.put(Leave([held[1]]))
    denoiser.extend(*((one, blocks[one]) for one in held))
    denoiser.finished(2)
    rates = denoiser.context.decay_rates
    for one in (held[0], held[2]):
        ours = dict(state_tensors(denoiser.loop._residents[one].state, rates))
        for key, tensor in state_tensors(denoiser.sessions[one].state, rates):
            assert torch.equal(tensor, ours[key]) or key.name == "conv"
    assert held[1] not in denoiser.loop._residents
    denoiser.until(TensorsRead, 4)


def test_a_session_that_leaves_gets_no_further_forward_and_its_slot_goes_to_another(towers: TinyTowers) -> None:
    denoiser = _Denoiser(towers, slots=1)
    leaving = denoiser.begin("leaves", GenerationParams(gamma=1.0, block_size=64, steps=64), room=128)
    denoiser.loop.iterate()
    block = denoiser.loop._residents[leaving].block
    assert block is not None
    assert block.forwards == 1
    denoiser.loop.inbox.put(Leave([leaving]))
    staying = denoiser.begin("stays")
    (free,) = denoiser.until(SlotsFree)
    assert list(free.held) == [leaving]
    blocks = denoiser.finished(1)
    assert block.forwards == 1
    assert blocks[staying].tokens.tolist() == _alone(towers, PARAMS[0]).tokens.tolist()
    assert denoiser.pool.used_slots == 1


def test_a_session_that_leaves_with_its_delta_on_the_way(towers: TinyTowers) -> None:
    """Whoever has the slot by then is not extended by it."""
    denoiser = _Denoiser(towers, slots=1)
    leaving = denoiser.begin("leaves")
    blocks = denoiser.finished(1)
    denoiser.loop.inbox.put(Leave([leaving]))
    staying = denoiser.begin("stays", SLOW)
    denoiser.extend((leaving, blocks[leaving]))
    blocks = denoiser.finished(1)
    assert blocks[staying].tokens.tolist() == _alone(towers, SLOW).tokens.tolist()
    assert denoiser.loop._residents[staying].state.length == 3
    denoiser.until(TensorsRead, 3)


def test_states_wait_for_room_and_leave_while_they_wait(towers: TinyTowers) -> None:
    denoiser = _Denoiser(towers, slots=1)
    first, second, third = (denoiser.begin(name) for name in "abc")
    denoiser.finished(1)
    denoiser.loop.inbox.put(Leave([second]))
    denoiser.loop.iterate()
    denoiser.loop.inbox.put(Leave([first]))
    blocks = denoiser.finished(1)
    assert set(blocks) == {third}
    denoiser.until(TensorsRead, 3)
    denoiser.loop.inbox.put(Leave([third]))
    denoiser.loop.iterate()
    assert denoiser.pool.used_slots == denoiser.pool.used_pages == 0


def test_a_delta_that_does_not_follow_the_state_fails_its_session(towers: TinyTowers) -> None:
    denoiser = _Denoiser(towers)
    held = denoiser.begin("a")
    blocks = denoiser.finished(1)
    denoiser.extend((held, blocks[held]), length=99)
    (failed,) = denoiser.until(SessionsFailed)
    ((who, error),) = failed.sessions
    assert who == held
    assert isinstance(error, Incompatible)
    assert denoiser.pool.used_slots == 0


def test_only_the_session_that_fails_alone_fails(towers: TinyTowers, monkeypatch: pytest.MonkeyPatch) -> None:
    denoiser = _Denoiser(towers)
    step = denoiser.loop.engine.step

    def poisoned(blocks: Sequence[Refinement]) -> None:
        if any(block.params.seed == 13 for block in blocks):
            raise RuntimeError("device-side assert")
        step(blocks)

    monkeypatch.setattr(denoiser.loop.engine, "step", poisoned)
    held = [denoiser.begin(str(i), GenerationParams(gamma=0.1, seed=13 if i == 2 else 0)) for i in range(5)]
    (failed,) = denoiser.until(SessionsFailed)
    assert [who for who, _ in failed.sessions] == [held[2]]
    blocks = denoiser.finished(4)
    alone = _alone(towers, PARAMS[0]).tokens.tolist()
    assert all(block.tokens.tolist() == alone for block in blocks.values())
    assert denoiser.pool.used_slots == 4


def test_logits_that_are_not_finite_fail_their_session(towers: TinyTowers) -> None:
    denoiser = _Denoiser(towers)
    bad, good = denoiser.begin("bad"), denoiser.begin("good")
    begin = denoiser.loop.engine.start

    def spoil(params: GenerationParams, state: Any, generated: int) -> Refinement:
        if denoiser.pool.used_slots == 1:  # the first to come
            for layer in state.mamba.values():
                layer.ssm.fill_(torch.nan)
        return begin(params, state, generated)

    denoiser.loop.engine.start = spoil  # type: ignore[method-assign,assignment]
    (failed,) = denoiser.until(SessionsFailed)
    ((who, error),) = failed.sessions
    assert who == bad
    assert isinstance(error, NonFiniteLogits)
    assert set(denoiser.finished(1)) == {good}


def test_a_device_that_fails_session_after_session_ends_the_loop(towers: TinyTowers, monkeypatch: pytest.MonkeyPatch) -> None:
    denoiser = _Denoiser(towers)

    def broken(blocks: object) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(denoiser.loop.engine, "step", broken)
    for i in range(MAX_FAILURES):
        denoiser.begin(str(i))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        denoiser.until(BlocksFinished)


def test_one_session_that_fails_again_and_again_is_not_the_devices_fault(
    towers: TinyTowers, monkeypatch: pytest.MonkeyPatch
) -> None:
    denoiser = _Denoiser(towers)

    def broken(blocks: object) -> None:
        raise RuntimeError("device-side assert")

    monkeypatch.setattr(denoiser.loop.engine, "step", broken)
    for _ in range(2 * MAX_FAILURES):
        denoiser.begin("the same")
        denoiser.until(SessionsFailed)
