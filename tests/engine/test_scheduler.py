"""The order of work in the context tower."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from twotower.engine.scheduler import Plan, plan

CHUNK = 32


@dataclass(eq=False)
class Item:
    prefill_left: int = 0
    block: Sequence[int] | None = None
    decodes: bool = False
    over: bool = False
    alone: bool = False
    position: int = 0


def _plan(*items: Item, budget: int = 100) -> Plan[Item]:
    return plan(items, budget=budget, chunk=CHUNK)


def test_commits_and_decodes_are_all_taken_and_prompts_get_the_rest() -> None:
    prompts = [Item(prefill_left=500) for _ in range(5)]
    commit, decode = Item(block=[0] * 16), Item(decodes=True)
    ahead = _plan(*prompts, commit, decode)
    assert ahead.commits == [commit]
    assert ahead.decodes == [decode]
    assert ahead.chunks == [(prompt, CHUNK) for prompt in prompts[:3]]


def test_a_chunk_ends_at_a_multiple_wherever_it_begins() -> None:
    items = [Item(prefill_left=500, position=40), Item(prefill_left=5, position=64), Item(prefill_left=32, position=32)]
    assert [tokens for _, tokens in _plan(*items).chunks] == [24, 5, 32]


def test_prompts_never_starve() -> None:
    prompt = Item(prefill_left=500)
    ahead = _plan(prompt, *(Item(block=[0] * 16) for _ in range(20)))
    assert len(ahead.commits) == 20
    assert ahead.chunks == [(prompt, CHUNK)]


def test_the_work_of_who_is_over_is_not_planned() -> None:
    assert not _plan(Item(prefill_left=5, over=True), Item(block=[1], over=True), Item(decodes=True, over=True))


def test_a_prompt_that_failed_with_others_is_read_alone() -> None:
    alone, others = Item(prefill_left=5, alone=True), [Item(prefill_left=5), Item(prefill_left=5)]
    assert _plan(alone, *others).chunks == [(alone, 5)]
    assert _plan(others[0], alone, others[1]).chunks == [(others[0], 5), (others[1], 5)]


def test_tokens_of_a_session_that_failed_with_others_are_drawn_alone() -> None:
    alone, others = Item(decodes=True, alone=True), [Item(decodes=True), Item(decodes=True)]
    assert _plan(alone, *others).decodes == [alone]
    assert _plan(*others, alone).decodes == others


@given(st.lists(st.tuples(st.sampled_from("cdp"), st.integers(1, 300), st.booleans()), max_size=40), st.integers(1, 200))
def test_everything_is_done_once(work: list[tuple[str, int, bool]], budget: int) -> None:
    items = [
        Item(prefill_left=tokens, alone=alone)
        if kind == "p"
        else Item(block=[0] * tokens if kind == "c" else None, decodes=kind == "d", alone=alone)
        for kind, tokens, alone in work
    ]
    done: list[Item] = []
    while ahead := _plan(*items, budget=budget):
        assert sum(tokens for _, tokens in ahead.chunks) <= max(budget, 1) + CHUNK - 1
        assert len(ahead.chunks) <= 1 or not any(item.alone for item, _ in ahead.chunks)
        assert len(ahead.decodes) <= 1 or not any(item.alone for item in ahead.decodes)
        for item in (*ahead.commits, *ahead.decodes):
            item.block, item.decodes = None, False
            done.append(item)
        for item, count in ahead.chunks:
            assert 0 < count <= item.prefill_left
            item.prefill_left -= count
            item.position += count
            assert item.position % CHUNK == 0 or not item.prefill_left
            if not item.prefill_left:
                done.append(item)
    assert len(done) == len(items)
    assert {id(item) for item in done} == {id(item) for item in items}
