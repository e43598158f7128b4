"""The sources of training texts: the built-in tasks, a user's JSONL file, or plain text.

A source makes *pools*: lists of a few thousand examples, each a function of its number alone, so that an
interrupted run can continue at its place.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from twotower.errors import ConfigError
from twotower.train.bpe import EOS
from twotower.train.families.item import Item, Split
from twotower.train.families.registry import DRILLS, TASKS

POOL_SIZE = 2048
"""Examples of a pool."""

PROMPT_ENDS = (("", 14), ("\n", 2), (" ", 1), ("\nAnswer:", 2), (" Answer:", 1))
"""Text that may follow a question, with weights: a user need not know how prompts end."""

CODE_ENDS = (("", 12), ("\n", 5), ("\n    ", 2))
"""Text that may follow a docstring, with weights."""


@dataclass(frozen=True, slots=True)
class Text:
    """A prompt and its completion (without the end-of-sequence token)."""

    prompt: str
    completion: str
    open_start: bool = False
    """Whether the prompt is cut from a longer text, so that tokens at its start may be dropped."""
    open_end: bool = False
    """Whether the completion is cut off, so that no end-of-sequence token follows it."""


@dataclass(frozen=True, slots=True)
class Example:
    """A text as token ids."""

    prompt: tuple[int, ...]
    completion: tuple[int, ...]
    """The completion, with the end-of-sequence token unless it is cut off."""
    open_end: bool = False


Source = Callable[[int], list[Text]]
"""A function from a pool's number to its texts."""


@dataclass(frozen=True, slots=True)
class BuiltIn:
    """The built-in tasks as a source, with prompts that end in various ways, mixed with drills of sums."""

    seed: int
    tasks: str = "stories"
    """A name of `TASKS`."""
    split: Split = "train"
    size: int = POOL_SIZE
    drill_share: float | None = None
    """The share of drills; None: the task set's own."""
    max_number: int | None = None
    """The greatest number in problems and drills; None: the task set's own."""

    def __call__(self, number: int) -> list[Text]:
        """See `Source`."""
        tasks, seed = TASKS[self.tasks], self.seed * 1_000_003 + number
        most = tasks.max_number if self.max_number is None else self.max_number
        shares = tasks.shares if self.drill_share is None else tasks.with_drills(self.drill_share)
        rng = random.Random(f"mix:{self.split}:{seed}")
        streams = {name: make(self.split, seed, most) for name, make in tasks.families.items()}
        sums = tasks.drills(self.split, seed, most)
        texts = []
        for name in rng.choices(list(shares), list(shares.values()), k=self.size):
            if name == DRILLS:
                prompt, text = next(sums)
                texts.append(Text(prompt, "\n" + text))
            else:
                texts.append(posed(next(streams[name]), rng))
        return texts


def posed(item: Item, rng: random.Random) -> Text:
    """A task whose prompt has one of the possible ends."""
    if item.family == "code":
        end = rng.choices([e for e, _ in CODE_ENDS], [w for _, w in CODE_ENDS])[0]
        return Text(item.prompt + end, ("\n" + item.completion).removeprefix(end))
    end = rng.choices([e for e, _ in PROMPT_ENDS], [w for _, w in PROMPT_ENDS])[0]
    return Text(item.prompt + end, completion_after(end, item.completion))


def completion_after(end: str, solution: str) -> str:
    """The completion after a prompt's end: the solution on a new line, unless the prompt ended with a line break."""
    return solution if end.endswith("\n") else "\n" + solution


def from_corpus(path: Path, seed: int, size: int = POOL_SIZE) -> Source:
    """A user's texts: a JSONL file, or plain text in a .txt file or a directory of them. Raises ConfigError.

    Every pool is a shuffled part of the corpus, each epoch in another order.
    """
    texts = read_plain(path, seed) if path.is_dir() or path.suffix == ".txt" else read_jsonl(path)
    size = min(size, len(texts))

    def pool(number: int) -> list[Text]:
        per_epoch = len(texts) // size
        epoch, part = divmod(number, per_epoch)
        order = list(range(len(texts)))
        random.Random(f"{seed}:{epoch}").shuffle(order)
        return [texts[i] for i in order[part * size : (part + 1) * size]]

    return pool


WINDOW_WORDS = 160
"""Plain text is cut into pieces of this number of words."""

PROMPT_SHARE = (0.1, 0.5)
"""The range of the share of a piece that is its prompt, drawn once for each piece."""

PROMPT_GRID = 16
"""Prompts that may lose tokens at their start are cut to a multiple of this, so that many have equal length."""


def read_plain(path: Path, seed: int) -> list[Text]:
    """Pieces of all .txt files of a directory (or of one file), each a prompt and its continuation. Raises ConfigError."""
    files = sorted(path.rglob("*.txt")) if path.is_dir() else [path]
    rng = random.Random(f"prompts of plain text:{seed}")
    texts: list[Text] = []
    try:
        for file in files:
            texts += _pieces(file.read_text(encoding="utf-8"), rng)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"corpus {path} cannot be read: {error}") from None
    if not texts:
        raise ConfigError(f"corpus {path} holds no text" + (" in .txt files" if path.is_dir() else ""))
    return texts


def _pieces(document: str, rng: random.Random) -> Iterator[Text]:
    document = document.rstrip()
    starts = [word.start() for word in re.finditer(r"\s*\S+", document)]
    for first in range(0, len(starts), WINDOW_WORDS):
        last = min(first + WINDOW_WORDS, len(starts))
        middle = first + max(1, round((last - first) * rng.uniform(*PROMPT_SHARE)))
        if middle >= last:
            continue  # a single word has no continuation
        end = starts[last] if last < len(starts) else len(document)
        prompt, completion = document[starts[first] : starts[middle]], document[starts[middle] : end]
        yield Text(prompt, completion, open_start=first > 0, open_end=last < len(starts))


def read_jsonl(path: Path) -> list[Text]:
    """All texts of a file. Raises ConfigError, which names the line."""
    texts = []
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                    text = Text(row["prompt"], row["completion"])
                    if not (isinstance(text.prompt, str) and text.prompt and isinstance(text.completion, str)):
                        raise ValueError("prompt and completion must be text, the prompt not empty")
                except (ValueError, KeyError, TypeError) as error:
                    raise ConfigError(f"corpus {path}, line {number}: {error!r}") from None
                texts.append(text)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"corpus {path} cannot be read: {error}") from None
    if not texts:
        raise ConfigError(f"corpus {path} holds no texts")
    return texts


def encode(tokenizer: Tokenizer, texts: Sequence[Text]) -> list[Example]:
    """Texts as token ids. Prompt and completion are tokenized separately, as in serving, where the prompt comes alone."""
    prompts = tokenizer.encode_batch_fast([t.prompt for t in texts], add_special_tokens=False)
    completions = tokenizer.encode_batch_fast([t.completion for t in texts], add_special_tokens=False)
    return [_example(t, p.ids, c.ids) for t, p, c in zip(texts, prompts, completions, strict=True)]


def _example(text: Text, prompt: list[int], completion: list[int]) -> Example:
    if text.open_start and len(prompt) > PROMPT_GRID:
        prompt = prompt[len(prompt) % PROMPT_GRID :]
    return Example(tuple(prompt), tuple(completion) if text.open_end else (*completion, EOS), text.open_end)
