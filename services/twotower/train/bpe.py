"""The tokenizer: byte-level BPE over words, each with its leading space, and whole numbers.

With a vocabulary that holds the corpus's words whole, texts of one kind have the same number of tokens whatever their
names and numbers: a denoiser, which writes all positions of a block at once, then knows what belongs where.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable

from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

PAD, BOS, EOS, MASK = 0, 1, 2, 3
SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<mask>")
"""The special tokens, in order of their ids."""

VOCAB_SIZE = 1024

ROUND = 16
"""A whole-word vocabulary's size is a multiple of this, so that the head's product has a shape that kernels are fast on."""


def train_tokenizer(texts: Iterable[str], vocab_size: int = VOCAB_SIZE) -> Tokenizer:
    """A tokenizer for texts like these. Any text round-trips, since all 256 bytes are tokens."""
    tokenizer = _empty()
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    assert [tokenizer.token_to_id(t) for t in SPECIAL_TOKENS] == [PAD, BOS, EOS, MASK]
    return tokenizer


def whole_word_tokenizer(texts: Iterable[str], *, pieces: int, rarest: int, words: Iterable[str] = ()) -> Tokenizer:
    """A tokenizer with a token for every word that occurs `rarest` times and for `words`; other words are cut into pieces.

    Unlike `train_tokenizer`, it spends no entries on the beginnings of these words: `pieces` are learned for other words.
    """
    splitter = ByteLevel(add_prefix_space=False)
    seen = list(texts)
    counts: Counter[str] = Counter(piece for text in seen for piece, _ in splitter.pre_tokenize_str(text))
    wanted = [splitter.pre_tokenize_str(word) for word in words]
    assert all(len(parts) == 1 for parts in wanted)
    tokenizer = train_tokenizer(seen, len(SPECIAL_TOKENS) + 256 + pieces)
    model = json.loads(tokenizer.to_str())
    vocabulary: dict[str, int] = model["model"]["vocab"]
    often = [word for word, count in counts.most_common() if count >= rarest]
    whole = dict.fromkeys([*(parts[0][0] for parts in wanted), *often])
    new = [word for word in whole if word not in vocabulary]
    for word in new[: len(new) - (len(vocabulary) + len(new)) % ROUND]:  # the rarest words come last
        vocabulary[word] = len(vocabulary)
    model["model"]["ignore_merges"] = True  # a word of the vocabulary is never cut
    return Tokenizer.from_str(json.dumps(model))


def _empty() -> Tokenizer:
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    return tokenizer
