"""Tokens to text in pieces: the same text as at once, no half characters, cut before a stop string."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models

from tests.support.tokenizers import VOCAB_SIZE, write_byte_tokenizer
from twotower.errors import CheckpointError, InvalidArgument
from twotower.text.places import TokenPlaces
from twotower.text.stream import Detokenizer, TextStream
from twotower.text.tokenizer import Tokenizer

EOS, MASK = 2, 3


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(write_byte_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def push_all(stream: TextStream | Detokenizer, ids: list[int], size: int) -> str:
    return "".join(stream.push(ids[i : i + size]) for i in range(0, len(ids), size)) + stream.finish()


@pytest.mark.parametrize("text", ["the fox", " größer naïve", "日本語 and 🙂🙂", "\ttab\r\n\x00nul", "e\u0301 \u200d"])
def test_encode_and_decode_round_trip(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_lone_surrogate_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(InvalidArgument, match="prompt: is not valid Unicode"):
        tokenizer.encode("a\ud800b")


@pytest.mark.parametrize("content", [None, "", "{}", '{"model": 3}'])
def test_a_damaged_tokenizer_is_named(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is no tokenizer"):
        Tokenizer.load(path)


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=60), size=st.integers(1, 5))
def test_pieces_join_to_the_whole_text(tokenizer: Tokenizer, text: str, size: int) -> None:
    assert push_all(Detokenizer(tokenizer), tokenizer.encode(text) if text else [], size) == text


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(0, VOCAB_SIZE + 40), max_size=200), size=st.integers(1, 17))
def test_any_tokens_give_what_they_give_at_once(tokenizer: Tokenizer, ids: list[int], size: int) -> None:
    """Also bytes that are no UTF-8, special tokens, ids above the tokenizer's, and more than the window holds."""
    assert push_all(Detokenizer(tokenizer), ids, size) == tokenizer.decode(ids)


def test_an_unfinished_character_waits_for_its_last_byte(tokenizer: Tokenizer) -> None:
    ids = [i for byte in "🙂".encode() for i in byte_ids(tokenizer, byte)]
    assert len(ids) == 4
    stream = TextStream(tokenizer)
    assert [stream.push([i]) for i in ids] == ["", "", "", "🙂"]
    assert stream.finish() == ""


def test_a_character_that_never_ends_shows_as_replacement(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer)
    assert stream.push(byte_ids(tokenizer, 0xF0)) == ""
    assert stream.push(byte_ids(tokenizer, ord("x"))) == "\ufffdx"
    assert stream.push(byte_ids(tokenizer, 0xE6)) == ""
    assert stream.finish() == "\ufffd"


def test_endless_invalid_bytes_are_not_held_for_ever(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer)
    text = "".join(stream.push(byte_ids(tokenizer, 0xFF)) for _ in range(500))
    assert len(text) >= 497
    assert len(text + stream.finish()) == 500


def test_special_and_hidden_tokens_never_show(tokenizer: Tokenizer) -> None:
    a, b = tokenizer.encode("a")[0], tokenizer.encode("b")[0]
    assert push_all(TextStream(tokenizer), [a, EOS, 1, 0, MASK, b], 2) == "ab"
    assert push_all(TextStream(tokenizer, hidden_ids=[a]), [a, b], 2) == "b"


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        (["fox"], "the quick brown "),
        (["jumps", "brown fox"], "the quick "),
        (["abcdef", "bro"], "the quick "),
        (["the quick brown fox jumps over it", "row"], "the quick b"),
        (["nothing"], "the quick brown fox jumps 🙂"),
        (["🙂"], "the quick brown fox jumps "),
        (["🙂x"], "the quick brown fox jumps 🙂"),
        (["the"], ""),
        (["fox", "x j", "fox jumps"], "the quick brown "),
    ],
)
def test_stop_strings_cut_wherever_the_borders_are(tokenizer: Tokenizer, size: int, stop: list[str], expected: str) -> None:
    stream = TextStream(tokenizer, stop)
    ids = [i for byte in "the quick brown fox jumps 🙂".encode() for i in byte_ids(tokenizer, byte)]
    assert push_all(stream, ids, size) == expected
    assert stream.stopped == (expected != "the quick brown fox jumps 🙂")


def test_what_may_begin_a_stop_string_is_held_back(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer, ["\n\n"])
    newline = byte_ids(tokenizer, 10)
    assert stream.push(byte_ids(tokenizer, ord("a")) + newline) == "a"
    assert stream.push(byte_ids(tokenizer, ord("b"))) == "\nb"
    assert stream.push(newline) == ""
    assert not stream.stopped
    assert stream.push(newline) == ""
    assert stream.stopped
    assert stream.push(newline) == stream.finish() == ""


@settings(max_examples=200, deadline=None)
@given(
    text=st.text("abc", max_size=40),
    stop=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
    size=st.integers(1, 9),
)
def test_the_borders_of_pushes_do_not_matter(tokenizer: Tokenizer, text: str, stop: list[str], size: int) -> None:
    ids = [i for byte in text.encode() for i in byte_ids(tokenizer, byte)]
    whole, pieces = TextStream(tokenizer, stop), TextStream(tokenizer, stop)
    result = push_all(whole, ids, 1000)
    assert push_all(pieces, ids, size) == result
    assert text.startswith(result)
    assert not any(s in result for s in stop)
    assert whole.stopped == pieces.stopped == any(s in text for s in stop)


def test_a_decoder_with_byte_tokens(tmp_path: Path) -> None:
    """Llama's kind: one replacement character for each byte of an unfinished one, and a stripped first space."""
    vocab = {"<unk>": 0, **{f"<0x{b:02X}>": b + 1 for b in range(256)}, "▁a": 257, "▁b": 258}
    inner = tokenizers.Tokenizer(models.BPE(vocab, [], byte_fallback=True))
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = Tokenizer(inner)
    ids = [257, 258, *(b + 1 for b in "🙂".encode())] * 30
    assert push_all(TextStream(tokenizer), ids, 1) == tokenizer.decode(ids) == ("a b🙂" + " a b🙂" * 29)


def byte_ids(tokenizer: Tokenizer, byte: int) -> list[int]:
    """The id of a single byte: specials first, then the 256 letters of the byte alphabet, sorted."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    shown = {b: chr(b) for b in printable}
    shown |= {b: chr(256 + n) for n, b in enumerate(b for b in range(256) if b not in shown)}
    token = tokenizer._inner.token_to_id(shown[byte])
    assert token is not None
    return [token]


def test_a_name_for_every_token(tokenizer: Tokenizer) -> None:
    """Names of different tokens differ; those of tokens that are text join to it."""
    names = [tokenizer.name(token) for token in range(tokenizer.vocab_size)]
    assert len(set(names)) == len(names)
    assert tokenizer.name(EOS) == "</s>"
    assert tokenizer.name(tokenizer.vocab_size) == str(tokenizer.vocab_size)
    ids = tokenizer.encode("the quick brown fox jumps")
    assert "".join(tokenizer.name(token) for token in ids) == "the quick brown fox jumps"
    parts = tokenizer.encode("日")
    assert len(parts) > 1
    assert "\ufffd" not in "".join(tokenizer.name(token) for token in parts)


def test_a_name_keeps_the_space_that_a_decoder_drops(tmp_path: Path) -> None:
    inner = tokenizers.Tokenizer(models.WordLevel({"<unk>": 0, "▁the": 1, "▁fox": 2}, "<unk>"))
    inner.decoder = decoders.Metaspace()
    inner.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path / "tokenizer.json")
    assert tokenizer.decode([2]) == "fox"
    assert [tokenizer.name(token) for token in (1, 2)] == [" the", " fox"]


def test_a_text_that_cannot_fit_is_refused_before_it_is_tokenized(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    longest = tokenizer.max_token_bytes
    assert longest is not None
    assert longest == max(len(tokenizer._inner.id_to_token(i) or "") for i in range(tokenizer.vocab_size))
    monkeypatch.setattr(tokenizer, "_ids", lambda text: pytest.fail("it was tokenized"))
    with pytest.raises(InvalidArgument, match=r"^prompt: .* characters of text leave no room in the context of 100 tokens"):
        tokenizer.encode("é" * (50 * longest + 1), 100)


@pytest.mark.parametrize("text", ["quick brown fox ", "日本語🙂", "aé日🙂 ", "\n\n  "])
def test_a_text_that_does_not_fit_is_refused_early(tokenizer: Tokenizer, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenized = 0
    ids = tokenizer._ids

    def counting(piece: str) -> list[int]:
        nonlocal tokenized
        tokenized += len(piece)
        return ids(piece)

    monkeypatch.setattr(tokenizer, "_ids", counting)
    whole = text * (1_000_000 // len(text))
    most = 20_000
    monkeypatch.setattr(tokenizer, "max_token_bytes", None)  # as of one of which nothing is known
    with pytest.raises(InvalidArgument, match=r"^prompt: .* characters of text leave no room in the context of 20000 tokens"):
        tokenizer.encode(whole, most)
    assert tokenized <= 8 * most


@pytest.mark.parametrize("text", ["quick brown fox ", "日本語🙂", "aé日🙂 ", "\n\n  ", "aaaaaaa"])
def test_a_text_that_fits_is_never_refused(tokenizer: Tokenizer, text: str) -> None:
    whole = text * (100_000 // len(text))
    ids = tokenizer.encode(whole)
    assert tokenizer.encode(whole, len(ids)) == ids
    assert tokenizer.decode(ids) == whole


def test_what_a_tokenizer_may_drop_or_change_has_no_bound(tokenizer: Tokenizer) -> None:
    spec = json.loads(tokenizer._inner.to_str())

    def bound(**changes: Any) -> int | None:
        changed = tokenizers.Tokenizer.from_str(json.dumps({**spec, **changes}))
        return Tokenizer(changed).max_token_bytes

    assert bound() == tokenizer.max_token_bytes
    assert bound(normalizer={"type": "Lowercase"}) is None
    assert bound(pre_tokenizer={"type": "Whitespace"}) is None
    assert bound(pre_tokenizer=None) is None
    byte_level = spec["pre_tokenizer"]
    split = {"type": "Split", "pattern": {"Regex": "a"}, "behavior": "Isolated", "invert": False}
    both = {"type": "Sequence", "pretokenizers": [split, byte_level]}
    assert bound(pre_tokenizer=both) == tokenizer.max_token_bytes
    both = {"type": "Sequence", "pretokenizers": [{**split, "behavior": "Removed"}, byte_level]}
    assert bound(pre_tokenizer=both) is None
    long = {"id": 319, "content": "x" * 99, "single_word": False, "lstrip": False, "rstrip": False}
    added = [*spec["added_tokens"], {**long, "normalized": False, "special": True}]
    assert bound(added_tokens=added) == 99


def test_a_file_that_would_cut_prompts_does_not(tokenizer: Tokenizer, tmp_path: Path) -> None:
    cutting = tokenizers.Tokenizer.from_str(tokenizer._inner.to_str())
    cutting.enable_truncation(2)
    cutting.enable_padding(length=50)
    cutting.save(str(tmp_path / "tokenizer.json"))
    text = "the quick brown fox"
    assert Tokenizer.load(tmp_path / "tokenizer.json").encode(text) == tokenizer.encode(text)


def test_a_part_of_a_character_is_named_by_its_bytes(tokenizer: Tokenizer) -> None:
    assert [tokenizer.name(byte_ids(tokenizer, byte)[0]) for byte in (0xE6, 0xFF)] == ["bytes:\\xe6", "bytes:\\xff"]
    parts = tokenizer.encode("日")
    assert b"".join(tokenizer.bytes_of(part) for part in parts).decode() == "日"
    assert tokenizer.bytes_of(tokenizer.encode("the")[0]).decode() == tokenizer.name(tokenizer.encode("the")[0])
    assert tokenizer.bytes_of(EOS) == b"</s>"
    inner = tokenizers.Tokenizer(models.BPE({"<unk>": 0, "<0xE6>": 1, "a": 2}, [], byte_fallback=True))
    inner.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    fallback = Tokenizer(inner)
    assert (fallback.name(1), fallback.bytes_of(1), fallback.name(2)) == ("bytes:\\xe6", b"\xe6", "a")


def places_of(tokenizer: Tokenizer, ids: list[int]) -> tuple[list[int], int]:
    places = TokenPlaces(tokenizer)
    told = [place for token in ids for place in places.push(token)]
    return told + places.finish(), places.length


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (b"ab", [0, 1]),
        (b"a\xe6\x97\xa5b", [0, 1, 1, 1, 2]),
        (b"\xe6b", [0, 1]),  # a lone byte, and what is right behind it
        (b"\xe6\x97b", [0, 0, 1]),
        (b"\xe6\xe6\x97\xa5b", [0, 1, 1, 1, 2]),
        (b"\xff\xff\xff\xff\xffa", [0, 1, 2, 3, 4, 5]),
        (b"\xf0\x9f\x99\x82\xf0", [0, 0, 0, 0, 1]),
        (b"\xf0\x9fa\x82", [0, 0, 1, 2]),
    ],
)
def test_places_behind_lone_bytes(tokenizer: Tokenizer, raw: bytes, expected: list[int]) -> None:
    ids = [i for byte in raw for i in byte_ids(tokenizer, byte)]
    assert places_of(tokenizer, ids) == (expected, len(raw.decode(errors="replace")))


@settings(max_examples=200, deadline=None)
@given(raw=st.binary(max_size=40), marks=st.lists(st.integers(0, 40), max_size=3))
def test_every_token_is_found_at_its_place(tokenizer: Tokenizer, raw: bytes, marks: list[int]) -> None:
    """Any bytes, each a token, with end-of-sequence tokens between: places are those of Python's own decoder."""
    ids = [i for byte in raw for i in byte_ids(tokenizer, byte)]
    spans: list[int] = []
    for start in range(len(raw)):
        # Characters that begin at or before this byte, but for the one that it begins.
        spans.append(len(raw.decode(errors="replace")) - _characters_from(raw, start))
    places, length = places_of(tokenizer, ids)
    assert (places, length) == (spans, len(raw.decode(errors="replace")))
    for mark in marks:
        ids.insert(min(mark, len(ids)), EOS)
    places, _ = places_of(tokenizer, ids)
    assert len(places) == len(ids)
    assert places == sorted(places)
    assert [place for place, token in zip(places, ids, strict=True) if token != EOS] == spans


def _characters_from(raw: bytes, start: int) -> int:
    """Characters of `raw` from the one that holds the byte at `start` on."""
    position, text = 0, raw.decode(errors="replace")
    for count, character in enumerate(text):
        size = _size(raw, position, character)
        if position + size > start:
            return len(text) - count
        position += size
    raise AssertionError(start)


def _size(raw: bytes, position: int, character: str) -> int:
    """Bytes of the character that stands at `position`: of a replacement, the longest beginning of a character."""
    encoded = character.encode()
    if raw.startswith(encoded, position):
        return len(encoded)
    return max(n for n in range(1, 4) if raw[position : position + n].decode(errors="replace") == "\ufffd")
