"""Properties of the one decision, for whatever is known."""

from __future__ import annotations

import dataclasses
import math

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from twotower.gateway.scaling import Bounds, Decision, Known, Past, Policy, Role, decide

whenever = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
"""A machine that is busy with other tests says nothing about the decision."""

counts = st.integers(0, 40)
seconds = st.floats(0, 60, allow_nan=False)


@st.composite
def roles(draw: st.DrawFn) -> Role:
    live = draw(st.integers(0, 6))
    slots = live * draw(st.integers(1, 16))
    return Role(live, slots, draw(st.integers(0, slots)), draw(counts), draw(seconds), draw(st.floats(0, 5)))


@st.composite
def policies(draw: st.DrawFn) -> Policy:
    def bounds() -> Bounds:
        least = draw(st.integers(0, 3))
        return Bounds(least, draw(st.integers(max(1, least), 12)))

    return Policy(
        bounds(),
        bounds(),
        goal_s=draw(st.floats(0.1, 10)),
        fill=draw(st.floats(0.1, 1)),
        up_every_s=draw(st.floats(0, 30)),
        down_after_s=draw(st.floats(0, 60)),
    )


@st.composite
def moments(draw: st.DrawFn, now: float = 0.0) -> Known:
    return Known(now, draw(roles()), draw(roles()), draw(st.floats(0, 2)), draw(st.floats(0, 2)), draw(counts))


@st.composite
def histories(draw: st.DrawFn) -> list[Known]:
    """Moments, one after the other."""
    steps = draw(st.lists(st.floats(0.5, 20), min_size=1, max_size=25))
    moments_ = [draw(moments()) for _ in steps]
    now, out = 0.0, []
    for step, moment in zip(steps, moments_, strict=True):
        now += step
        out.append(dataclasses.replace(moment, now=now))
    return out


def play(history: list[Known], policy: Policy) -> list[Decision]:
    past: Past | None = None
    out = []
    for known in history:
        decision = decide(known, policy, past)
        past = decision.past
        out.append(decision)
    return out


@whenever
@given(histories(), policies())
def test_bounded(history: list[Known], policy: Policy) -> None:
    for decision in play(history, policy):
        assert policy.denoisers.least <= decision.denoisers.count <= policy.denoisers.most
        assert policy.contexts.least <= decision.contexts.count <= policy.contexts.most
        assert decision.denoisers.why
        assert decision.contexts.why


@whenever
@given(histories(), policies(), counts, counts)
def test_more_backlog_never_wants_less(history: list[Known], policy: Policy, waiting: int, running: int) -> None:
    *before, last = history
    past = play(before, policy)[-1].past if before else None
    denoisers = dataclasses.replace(
        last.denoisers, waiting=last.denoisers.waiting + waiting, running=last.denoisers.running + running
    )
    contexts = dataclasses.replace(last.contexts, waiting=last.contexts.waiting + waiting)
    more = dataclasses.replace(last, denoisers=denoisers, contexts=contexts)
    less, decided = decide(last, policy, past), decide(more, policy, past)
    assert decided.denoisers.count >= less.denoisers.count
    assert decided.contexts.count >= less.contexts.count


@whenever
@given(histories(), policies(), seconds)
def test_an_older_waiter_never_wants_less(history: list[Known], policy: Policy, older: float) -> None:
    *before, last = history
    past = play(before, policy)[-1].past if before else None
    more = dataclasses.replace(last, denoisers=dataclasses.replace(last.denoisers, oldest_s=last.denoisers.oldest_s + older))
    assert decide(more, policy, past).denoisers.count >= decide(last, policy, past).denoisers.count


@whenever
@given(histories(), policies())
def test_what_runs_keeps_its_slots(history: list[Known], policy: Policy) -> None:
    """Not even an operator who starts more than was wanted, or a cool-down, makes the decision take slots from sessions."""
    for known, decision in zip(history, play(history, policy), strict=True):
        for role, bounds, wanted in (
            (known.denoisers, policy.denoisers, decision.denoisers),
            (known.contexts, policy.contexts, decision.contexts),
        ):
            if role.live:
                needed = math.ceil(role.running * role.live / role.slots - 1e-9)
                assert wanted.count >= min(needed, bounds.most)


@whenever
@given(histories(), policies())
def test_no_fall_soon_after_a_raise(history: list[Known], policy: Policy) -> None:
    decisions = play(history, policy)
    for name in ("denoisers", "contexts"):
        raised = -math.inf
        for known, before, after in zip(history[1:], decisions, decisions[1:], strict=False):
            was, wanted = getattr(before, name).count, getattr(after, name).count
            if wanted > was:
                raised = known.now
            elif wanted < was:
                assert known.now - raised >= policy.down_after_s


@whenever
@given(histories(), policies())
def test_raises_are_apart(history: list[Known], policy: Policy) -> None:
    """Except from none, and where running sessions would lose their slots."""
    decisions = play(history, policy)
    raised = -math.inf
    for known, before, after in zip(history[1:], decisions, decisions[1:], strict=False):
        was, wanted, role = before.denoisers.count, after.denoisers.count, known.denoisers
        if wanted > was:
            floor = math.ceil(role.running * role.live / role.slots - 1e-9) if role.live else 0
            assert was == 0 or known.now - raised >= policy.up_every_s or wanted <= floor
            raised = known.now


@whenever
@given(moments(), policies())
def test_the_first_decision_scales_nothing_down(known: Known, policy: Policy) -> None:
    """A gateway that has just started has not seen that fewer are enough."""
    decision = decide(known, policy)
    assert decision.denoisers.count >= min(known.denoisers.live, policy.denoisers.most)
    assert decision.contexts.count >= min(known.contexts.live, policy.contexts.most)


@whenever
@given(policies(), st.integers(1, 100), counts)
def test_from_zero(policy: Policy, waiting: int, earlier: int) -> None:
    """One that waits is enough, at once, whatever the cool-downs; and nobody is wanted for nobody."""
    nobody = Role()
    down_to_none = dataclasses.replace(policy, denoisers=Bounds(0, policy.denoisers.most))
    idle = decide(Known(0.0, nobody, nobody), down_to_none)
    assert idle.denoisers.count == 0
    asked = decide(Known(0.5, Role(waiting=waiting), nobody), down_to_none, idle.past)
    assert asked.denoisers.count >= 1


POLICY = Policy(Bounds(1, 8), Bounds(1, 4), goal_s=2, fill=0.8, up_every_s=15, down_after_s=60)


def wanted(role: Role, **of_contexts: float) -> tuple[int, str]:
    decision = decide(Known(0.0, role, Role(1, 64, 8), **of_contexts), POLICY)  # type: ignore[arg-type]
    return decision.denoisers.count, decision.denoisers.why


def test_examples() -> None:
    assert wanted(Role(1, 8, 4))[0] == 1
    count, why = wanted(Role(1, 8, 8, 20))
    assert count == 5  # 28 sessions, 6.4 of 8 slots each
    assert "8 sessions run and 20 wait" in why
    assert wanted(Role(1, 8, 8, 20, leaving_per_s=10))[0] == 2  # 20 more get a slot within the goal
    assert wanted(Role(2, 16, 2, 1, oldest_s=1))[0] == 2
    count, why = wanted(Role(2, 16, 2, 1, oldest_s=3))
    assert count == 3
    assert "has waited 3.0 s" in why
    count, why = wanted(Role(2, 16, 16, 400))
    assert count == 8
    assert "1 to 8 are allowed" in why


def test_contexts_that_keep_denoisers_waiting() -> None:
    known = Known(0.0, Role(4, 32, 30), Role(1, 64, 30), refine_s=0.2, commit_s=0.3, refining=12)
    decision = decide(known, POLICY)
    assert decision.contexts.count == 2
    assert "denoisers wait for contexts" in decision.contexts.why
    assert decide(dataclasses.replace(known, commit_s=0.1), POLICY).contexts.count == 1


def test_one_long_prompt_wants_no_second_context() -> None:
    """It would be read there no sooner."""
    assert decide(Known(0.0, Role(1, 8), Role(1, 64, 0, 1, 30.0)), POLICY).contexts.count == 1
    assert decide(Known(0.0, Role(1, 8), Role(1, 64, 0, 3, 30.0)), POLICY).contexts.count == 2


def test_a_step_of_load_up_and_down() -> None:
    """1 -> 3 at once, held while load comes and goes, and 1 again a minute after the last need."""
    busy, calm = Role(1, 8, 8, 8), Role(3, 24, 2)
    past, counts_ = None, []
    for now, role in (
        (0, Role(1, 8, 1)),
        (1, busy),
        (20, calm),
        (30, dataclasses.replace(calm, running=14)),
        (89, calm),
        (91, calm),
    ):
        decision = decide(Known(float(now), role, Role(1, 64, role.running)), POLICY, past)
        past = decision.past
        counts_.append(decision.denoisers.count)
    assert counts_ == [1, 3, 3, 3, 3, 1]
