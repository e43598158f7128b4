from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from twotower.train.bpe import BOS, EOS, MASK, PAD, whole_word_tokenizer
from twotower.train.families.stories.problems import problems

LOADED: dict[str, Tokenizer] = {}


@pytest.fixture(autouse=True, scope="module")
def loaded(tokenizer: Tokenizer) -> None:
    LOADED["t"] = tokenizer


def test_special_ids_are_fixed(tokenizer: Tokenizer) -> None:
    assert [tokenizer.id_to_token(i) for i in range(4)] == ["<pad>", "<bos>", "<eos>", "<mask>"]
    assert [PAD, BOS, EOS, MASK] == [0, 1, 2, 3]


def test_words_and_numbers_of_the_problems_are_whole(full_tokenizer: Tokenizer) -> None:
    pieces = ["Step", " 2", ":", " Tom", " buys", " 7", " more", " apples", ",", " so", " 12", " +", " 7", " =", " 19", "."]
    assert [full_tokenizer.decode([i]) for i in full_tokenizer.encode("".join(pieces)).ids] == pieces


@given(st.text())
def test_any_text_round_trips(text: str) -> None:
    assume_plain = text.replace("<", "(")  # the names of special tokens are these tokens
    tokenizer = LOADED["t"]
    assert tokenizer.decode(tokenizer.encode(assume_plain).ids) == assume_plain


def test_prompt_and_completion_apart_are_the_tokens_of_the_whole(tokenizer: Tokenizer) -> None:
    for _, problem in zip(range(100), problems("eval", 0), strict=False):
        apart = tokenizer.encode(problem.question).ids + tokenizer.encode("\n" + problem.solution).ids
        assert apart == tokenizer.encode(f"{problem.question}\n{problem.solution}").ids


def test_a_whole_word_vocabulary_keeps_frequent_words_whole_and_round_trips_the_rest() -> None:
    texts = ["return total + 1\n", "kites and kites and kites", "rare"] * 3
    tokenizer = whole_word_tokenizer(texts, pieces=20, rarest=6, words=[f" {i}" for i in range(120)])
    assert tokenizer.get_vocab_size() % 16 == 0
    assert len(tokenizer.encode(" kites and 99").ids) == 3
    for text in ("rare words, \u00e9 and 1234", "def f(x):\n    return x\n"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
