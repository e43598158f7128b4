"""The order of work in the context tower."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from twotower.engine.scheduler import MIN_PREFILL, ContextScheduler


@dataclass(eq=False)
class Item:
    tokens: int


def _scheduler(budget: int = 100) -> ContextScheduler[Item]:
    return ContextScheduler(budget, lambda item: item.tokens)


def test_commits_and_decodes_go_whole_and_prefill_gets_the_rest() -> None:
    scheduler = _scheduler()
    commit, decode, prompt = Item(16), Item(0), Item(500)
    scheduler.add_prefill(prompt)
    scheduler.add_decode(decode)
    scheduler.add_commit(commit)
    plan = scheduler.plan()
    assert plan.commits == [commit]
    assert plan.decodes == [decode]
    assert plan.prefills == [(prompt, 100 - 16 - 1)]


def test_prompts_share_the_budget_in_order_of_arrival() -> None:
    scheduler = _scheduler()
    items = [Item(60), Item(60), Item(60)]
    for item in items:
        scheduler.add_prefill(item)
    assert scheduler.plan().prefills == [(items[0], 60), (items[1], 40)]


def test_a_prompt_stays_until_it_is_read() -> None:
    scheduler = _scheduler()
    prompt = Item(150)
    scheduler.add_prefill(prompt)
    taken = []
    while plan := scheduler.plan():
        (_, count), *_ = plan.prefills
        taken.append(count)
        prompt.tokens -= count
    assert taken == [100, 50]


def test_prefill_never_starves() -> None:
    scheduler = _scheduler()
    scheduler.add_prefill(Item(500))
    for _ in range(20):
        scheduler.add_commit(Item(16))
    assert scheduler.plan().prefills[0][1] == MIN_PREFILL


def test_discarded_work_is_not_planned() -> None:
    scheduler = _scheduler()
    items = [Item(5) for _ in range(3)]
    scheduler.add_commit(items[0])
    scheduler.add_decode(items[1])
    scheduler.add_prefill(items[2])
    for item in items:
        scheduler.discard(item)
        scheduler.discard(item)
    assert not scheduler.plan()


@given(st.lists(st.tuples(st.sampled_from("cdp"), st.integers(1, 300)), max_size=40), st.integers(1, 200))
def test_everything_is_done_once(work: list[tuple[str, int]], budget: int) -> None:
    scheduler = _scheduler(budget)
    items = [(kind, Item(tokens)) for kind, tokens in work]
    for kind, item in items:
        {"c": scheduler.add_commit, "d": scheduler.add_decode, "p": scheduler.add_prefill}[kind](item)
    done: list[Item] = []
    while plan := scheduler.plan():
        assert sum(count for _, count in plan.prefills) <= max(budget, MIN_PREFILL)
        done += plan.commits + plan.decodes
        for item, count in plan.prefills:
            assert 0 < count <= item.tokens
            item.tokens -= count
            if not item.tokens:
                done.append(item)
    assert {id(item) for item in done} == {id(item) for _, item in items}
    assert len(done) == len(items)
