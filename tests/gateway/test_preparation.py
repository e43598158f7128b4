"""Requests are checked, resolved and tokenized in one place."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.checkpoints import write_tiny_checkpoint
from tests.support.tokenizers import VOCAB_SIZE, write_byte_tokenizer
from twotower.errors import InvalidArgument
from twotower.gateway.preparation import Preparation, hidden_ids, text_stream
from twotower.gateway.request import Request
from twotower.model.checkpoint import Checkpoint
from twotower.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    path = write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"), vocab_size=VOCAB_SIZE)
    write_byte_tokenizer(path)
    return Checkpoint.open(path)


def _tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    assert checkpoint.tokenizer_path is not None
    return Tokenizer.load(checkpoint.tokenizer_path)


def test_text_and_ids_become_the_same_request(checkpoint: Checkpoint) -> None:
    tokenizer = _tokenizer(checkpoint)
    preparation = Preparation(tokenizer, checkpoint.limits)
    text = preparation.check(Request("the fox", 20, gamma=0.5))
    ids = Preparation(None, checkpoint.limits).check(Request(tuple(tokenizer.encode("the fox")), 20, gamma=0.5))
    assert text == ids
    assert (text.params.max_tokens, text.params.gamma, text.params.block_size) == (20, 0.5, checkpoint.limits.block_size)
    assert preparation.check(Request("the fox", 20)).prompt is text.prompt  # tokenized once


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (Request("", 20), "prompt"),
        (Request((), 20), "prompt"),
        (Request((10**6,), 20), "prompt"),
        (Request((1,) * 100_000, 20), "prompt"),
        (Request("a" * 100_000, 20), "prompt"),
        (Request("a", 20, gamma=2.0), "gamma"),
        (Request("a", 20, stop=("",)), "stop"),
    ],
)
def test_what_cannot_be_served_names_the_field(checkpoint: Checkpoint, request_: Request, field: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        Preparation(_tokenizer(checkpoint), checkpoint.limits).check(request_)
    assert caught.value.field.startswith(field)


def test_a_checkpoint_without_a_tokenizer_takes_ids_and_writes_no_text(checkpoint: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="no tokenizer"):
        Preparation(None, checkpoint.limits).check(Request("a", 20))
    assert text_stream(None, checkpoint.limits, ()) is None
    stream = text_stream(_tokenizer(checkpoint), checkpoint.limits, ())
    assert stream is not None
    assert stream.push(list(hidden_ids(checkpoint.limits))) + stream.finish() == ""
