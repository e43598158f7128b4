"""A small byte-level BPE tokenizer, made in a moment."""

from __future__ import annotations

from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<mask>")
"""Ids 0 to 3; 2 and 3 are the end-of-sequence and mask ids of the published checkpoints."""

VOCAB_SIZE = 320

CORPUS = ["the quick brown fox jumps over the lazy dog", "then there were three of them", "größer, naïve, 日本語 and 🙂"]


def write_byte_tokenizer(directory: Path) -> Path:
    """Write `tokenizer.json` into `directory`: every text round-trips, and multi-byte characters span tokens."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    path = directory / "tokenizer.json"
    tokenizer.save(str(path))
    return path
