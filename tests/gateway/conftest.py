from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.checkpoints import write_tiny_checkpoint
from tests.support.tokenizers import VOCAB_SIZE, write_byte_tokenizer
from twotower.text.tokenizer import Tokenizer

BLOCK = 4
MAX_CONTEXT = 512


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a tokenizer."""
    path = tmp_path_factory.mktemp("checkpoint") / "tiny"
    write_tiny_checkpoint(path, vocab_size=VOCAB_SIZE, block_size=BLOCK, max_position_embeddings=MAX_CONTEXT)
    write_byte_tokenizer(path)
    return path


@pytest.fixture(scope="session")
def bare_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without one."""
    return write_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "bare", vocab_size=VOCAB_SIZE, block_size=BLOCK)


@pytest.fixture(scope="session")
def tokenizer(checkpoint: Path) -> Tokenizer:
    return Tokenizer.load(checkpoint / "tokenizer.json")
