from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from twotower.errors import ConfigError
from twotower.train.batches import PROMPT_STEP, Place, block_batches, sequence_batches, stream
from twotower.train.bpe import EOS
from twotower.train.corpus import PROMPT_GRID, BuiltIn, Example, encode, from_corpus, posed, read_jsonl, read_plain
from twotower.train.families.registry import TASKS

BLOCK = 16


def examples(tokenizer: Tokenizer) -> list[Example]:
    return encode(tokenizer, BuiltIn(0, size=100)(0))


def test_blocks_start_where_the_prompt_ends_and_hold_every_text_once(tokenizer: Tokenizer) -> None:
    texts = examples(tokenizer)
    most = 8 * sum(len(e.prompt) + len(e.completion) for e in texts) // len(texts)
    seen, sizes = [], set()
    for batch in block_batches(texts, 8, {4: 0.5, BLOCK: 0.5}, random.Random(0)):
        sizes.add(batch.block)
        texts_in = batch.tokens.shape[0]
        assert texts_in == 1 or texts_in * (batch.tokens.shape[1] - batch.block - PROMPT_STEP) <= most
        assert 0 <= int(batch.starts.min()) <= int(batch.starts.max()) < PROMPT_STEP
        for row, start, counts in zip(batch.tokens.tolist(), batch.starts.tolist(), batch.counts.tolist(), strict=True):
            completion = row[batch.prompt :]
            assert len(completion) == len(counts) * batch.block
            end = completion.index(EOS) + 1
            assert set(row[:start]) | set(completion[end:]) <= {EOS}
            assert sum(counts) == -(-end // batch.block)
            assert counts == sorted(counts, reverse=True)
            seen.append(Example(tuple(row[start : batch.prompt]), tuple(completion[:end])))
    assert sorted(seen, key=str) == sorted(texts, key=str)
    assert sizes == {4, BLOCK}


def test_sequences_weigh_completions_fully_and_padding_not(tokenizer: Tokenizer) -> None:
    texts = examples(tokenizer)
    batches = sequence_batches(texts, 8, 0.25, random.Random(0))
    assert sum(b.tokens.shape[0] for b in batches) == len(texts)
    assert sum(int((b.weights == 1).sum()) for b in batches) == sum(len(e.completion) for e in texts)
    assert sum(int((b.weights == 0.25).sum()) for b in batches) == sum(len(e.prompt) for e in texts)


def test_stream_continues_from_its_place() -> None:
    def pool(number: int) -> list[int]:
        return list(range(10 * number, 10 * number + 3))

    place = Place()
    whole = list(itertools.islice(stream(pool, Place()), 10))
    first = list(itertools.islice(stream(pool, place), 4))
    assert first + list(itertools.islice(stream(pool, place), 6)) == whole


def test_pools_are_functions_of_their_number() -> None:
    for tasks in ("stories", "suite"):
        source = BuiltIn(0, tasks, size=30)
        assert source(3) == BuiltIn(0, tasks, size=30)(3)
        assert source(3) != source(4)


def test_pools_made_ahead_by_processes_come_in_order() -> None:
    source = BuiltIn(0, size=8)
    ahead = itertools.islice(stream(source, Place(1, 2), workers=1), 14)
    assert list(ahead) == source(1)[2:] + source(2)


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_the_share_of_drills(share: float) -> None:
    texts = BuiltIn(0, "suite", size=200, drill_share=share)(0)
    drills = sum(text.prompt.startswith("Work out") for text in texts)
    assert drills == 0 if share == 0 else 70 < drills < 130


@pytest.mark.parametrize("end", ["", "\n", " ", "\n    "])
def test_whatever_a_prompt_ends_with_the_text_goes_on_from_there(end: str) -> None:
    class Always(random.Random):
        def choices(self, population: Sequence[str], *_: object, **__: object) -> list[str]:  # type: ignore[override]
            return [end if end in population else ""]

    for item in (next(make("train", 0, 100)) for make in TASKS["suite"].families.values()):
        text = posed(item, Always())
        assert (text.prompt + text.completion).replace(" \n", "\n") == f"{item.prompt}\n{item.completion}"


def test_own_corpus_gives_every_text_once_an_epoch(tmp_path: Path) -> None:
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(f'{{"prompt": "p{i}", "completion": "c{i}"}}\n' for i in range(6)))
    pool = from_corpus(file, seed=0, size=3)
    assert sorted(t.prompt for t in pool(0) + pool(1)) == [f"p{i}" for i in range(6)]
    assert pool(0) + pool(1) != pool(2) + pool(3)


@pytest.mark.parametrize(
    "text", ["", "{", '{"prompt": "a"}', '{"prompt": 1, "completion": "b"}', '{"prompt": "", "completion": "b"}']
)
def test_bad_corpus_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "texts.jsonl"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"texts\.jsonl"):
        read_jsonl(file)


def test_missing_corpus_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_jsonl(tmp_path / "none.jsonl")


def test_plain_text_becomes_prompts_and_how_they_go_on(tokenizer: Tokenizer, tmp_path: Path) -> None:
    long = " ".join(f"word{i}" for i in range(400)) + "\n"
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/long.txt").write_text(long)
    (tmp_path / "short.txt").write_text("One short text. ")
    (tmp_path / "other.md").write_text("not read")
    texts = read_plain(tmp_path, seed=0)
    assert texts == read_plain(tmp_path, seed=0) != read_plain(tmp_path, seed=1)
    assert "".join(t.prompt + t.completion for t in texts[:-1]) == long.rstrip()
    assert texts[-1].prompt + texts[-1].completion == "One short text."
    assert [(t.open_start, t.open_end) for t in texts] == [(False, True), (True, True), (True, False), (False, False)]

    encoded = encode(tokenizer, texts)
    assert [e.completion[-1] == EOS for e in encoded] == [False, False, True, True]
    assert all(len(e.prompt) % PROMPT_GRID == 0 for e in encoded[1:3])
    rows = [
        row[int(start) :].tolist()
        for batch in block_batches(encoded, 8, {BLOCK: 1.0}, random.Random(0))
        for row, start in zip(batch.tokens, batch.starts, strict=True)
    ]
    for e in encoded:  # what is cut off is not said to end
        [row] = [row for row in rows if tuple(row[: len(e.prompt)]) == e.prompt]
        assert (EOS in row[: len(e.prompt) + len(e.completion) // BLOCK * BLOCK + BLOCK * (not e.open_end)]) != e.open_end


@pytest.mark.parametrize("content", [b"", b"\xff\xfe bad", b"word"])
def test_plain_text_that_is_none_is_one_clear_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(ConfigError, match="corpus"):
        from_corpus(tmp_path / "a.txt", 0)
