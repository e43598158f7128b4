"""Where prompts part."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from twotower.prefix.borders import Borders
from twotower.prefix.chain import ChainSpec

SPEC = ChainSpec("abc", "float32", 2)


def test_the_second_prompt_shows_where_the_shared_part_ends() -> None:
    borders, system = Borders(100), [7] * 10
    assert borders.meet(SPEC.chain([*system, 1, 2, 3, 4])) == 0
    assert borders.meet(SPEC.chain([*system, 5, 6])) == 5
    assert borders.meet(SPEC.chain([*system, 1, 2])) == 6
    assert borders.meet(SPEC.chain([9, 9, 9, 9])) == 0
    assert borders.meet([]) == 0


@given(st.lists(st.lists(st.integers(0, 2), max_size=12), max_size=20))
def test_with_room_for_all_it_is_the_longest_shared_prefix(prompts: Sequence[list[int]]) -> None:
    borders = Borders(10_000)
    for i, prompt in enumerate(prompts):
        chain = SPEC.chain(prompt)
        shared = max((_shared(chain, SPEC.chain(earlier)) for earlier in prompts[:i]), default=0)
        assert borders.meet(chain) == shared


def _shared(one: Sequence[bytes], other: Sequence[bytes]) -> int:
    return sum(a == b for a, b in zip(one, other, strict=False))


def test_memory_is_bounded_and_loses_the_ends_of_the_oldest_first() -> None:
    borders = Borders(6)
    old, new = SPEC.chain([1] * 8), SPEC.chain([2] * 8)
    borders.meet(old)
    borders.meet(new)
    assert len(borders) == 6
    assert borders.meet(old) == 2
    assert borders.meet(new) == 2
