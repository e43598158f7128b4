"""The shipped checkpoint gives the right answer to every problem that users are shown, and to others in such words."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.eval.prompts import SHOWN, WRITTEN
from twotower.cli.demo import PROMPT
from twotower.cli.options import DEFAULT_CHECKPOINT
from twotower.engine.batch import generate_batch
from twotower.engine.local import LocalEngine
from twotower.request import GenerationParams, Mode
from twotower.text.tokenizer import Tokenizer
from twotower.train.families.answers import final_number, is_correct

ROOT = Path(__file__).parents[2]
PAGES = (
    ROOT / "README.md",
    DEFAULT_CHECKPOINT / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted(path for path in (ROOT / "examples").rglob("*") if path.suffix in (".md", ".py", ".sh")),
)
PROBLEM = re.compile(r"(?:[A-Z][^.?!\"\n]*\. )+[^.?!\"\n]*\?")
MODES = (Mode.AR, Mode.DIFFUSION, Mode.SPECULATIVE)


@pytest.fixture(scope="module")
def engine() -> LocalEngine:
    return LocalEngine(DEFAULT_CHECKPOINT, threads=1)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(DEFAULT_CHECKPOINT / "tokenizer.json")


def solve(engine: LocalEngine, tokenizer: Tokenizer, mode: Mode, questions: list[str]) -> list[str]:
    params = GenerationParams(mode=mode, max_tokens=96, eos_token_ids=engine.limits.eos_token_ids)
    prompts = [tokenizer.encode(question) for question in questions]
    results = sorted(generate_batch(engine.context, engine.denoiser, prompts, params, 8), key=lambda result: result.index)
    return [tokenizer.decode(result.token_ids) for result in results]


def shown_problems() -> set[str]:
    found = {problem for page in PAGES for problem in PROBLEM.findall(page.read_text(encoding="utf-8")) if "How m" in problem}
    return {PROMPT, *found}


def test_every_problem_that_is_shown_is_known_here() -> None:
    assert shown_problems() == set(SHOWN)


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.value)
def test_every_problem_that_is_shown_is_answered_right(engine: LocalEngine, tokenizer: Tokenizer, mode: Mode) -> None:
    ends = ("", "\n")  # as they are shown, and as one may send them
    texts = solve(engine, tokenizer, mode, [problem + end for end in ends for problem in SHOWN])
    assert [final_number(text) for text in texts] == list(SHOWN.values()) * len(ends), texts


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.value)
def test_problems_written_by_hand(engine: LocalEngine, tokenizer: Tokenizer, mode: Mode) -> None:
    texts = solve(engine, tokenizer, mode, [question for question, _ in WRITTEN])
    wrong = [(q, text) for (q, answer), text in zip(WRITTEN, texts, strict=True) if not is_correct(text, answer)]
    assert len(wrong) <= len(WRITTEN) // 10, wrong


def test_the_readme_shows_what_the_demo_prints(engine: LocalEngine, tokenizer: Tokenizer) -> None:
    [text] = solve(engine, tokenizer, Mode.DIFFUSION, [PROMPT])
    assert f"\n{PROMPT}\n{text}\n" in (ROOT / "README.md").read_text(encoding="utf-8")
