"""Links: equal exactly as far as prompts are, and all that their states depend on."""

from __future__ import annotations

import dataclasses
import hashlib
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from twotower.prefix.chain import MAX_ANNOUNCED, SHORT_BYTES, ChainSpec, pack_links, short, unpack_links

SPEC = ChainSpec("abc", "bfloat16", 4)
TOKENS = st.lists(st.integers(0, 131_071), max_size=40)


def test_a_link_is_the_hash_of_the_link_before_and_the_chunks_tokens() -> None:
    first, second = SPEC.chain([1, 2, 3, 4, 5, 6, 7, 131_071, 9])
    for link, before, tokens in ((first, SPEC.root, (1, 2, 3, 4)), (second, first, (5, 6, 7, 131_071))):
        data = before + struct.pack("<4q", *tokens)
        assert link == hashlib.blake2b(data, digest_size=16, person=b"twotower.prefix1").digest()


@given(TOKENS, TOKENS, st.integers(1, 7))
def test_chains_share_what_the_prompts_share_in_whole_chunks(one: list[int], other: list[int], size: int) -> None:
    spec = ChainSpec("abc", "float32", size)
    shared = 0
    while shared < min(len(one), len(other)) and one[shared] == other[shared]:
        shared += 1
    first, second = spec.chain(one), spec.chain(other)
    assert (len(first), len(second)) == (len(one) // size, len(other) // size)
    for i, (a, b) in enumerate(zip(first, second, strict=False)):
        assert (a == b) == (i < shared // size)


def test_a_chunk_has_another_link_behind_another_beginning() -> None:
    assert SPEC.chain([1, 2, 3, 4, 5, 6, 7, 8])[1] != SPEC.chain([0, 2, 3, 4, 5, 6, 7, 8])[1]


@pytest.mark.parametrize("change", [{"identity": "abd"}, {"dtype": "float32"}, {"chunk_tokens": 2}])
def test_other_states_have_other_links(change: dict[str, object]) -> None:
    tokens = list(range(16))
    other = dataclasses.replace(SPEC, **change)  # type: ignore[arg-type]
    assert not {SPEC.root, *SPEC.chain(tokens)} & {other.root, *other.chain(tokens)}


def test_specs_that_look_alike_when_joined_differ() -> None:
    assert ChainSpec("a", "b1", 2).root != ChainSpec("ab", "1", 2).root


def test_a_token_beyond_64_bits_is_refused() -> None:
    with pytest.raises(struct.error):
        SPEC.chain([1, 2, 3, 2**63])


def test_what_is_announced_comes_out_as_short_links() -> None:
    links = SPEC.chain(list(range(40)))
    packed = pack_links(links)
    assert len(packed) == 2 * SHORT_BYTES * len(links)
    assert unpack_links(packed) == {short(link) for link in links}
    assert unpack_links("") == frozenset()
    assert len(unpack_links(pack_links(SPEC.chain(list(range(4 * MAX_ANNOUNCED + 8)))))) == MAX_ANNOUNCED


@pytest.mark.parametrize("packed", ["no hex", "abc"])
def test_an_announcement_that_is_none_holds_nothing(packed: str) -> None:
    assert unpack_links(packed) == frozenset()
