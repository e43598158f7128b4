"""Accuracy on unseen problems: autoregressive and by diffusion, through the engine that serves."""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass

from tokenizers import Tokenizer

from twotower.engine.local import LocalEngine
from twotower.request import GenerationParams
from twotower.train.answers import is_correct
from twotower.train.problems import problems
from twotower.train.story import Problem


@dataclass(frozen=True, slots=True)
class Score:
    """What a mode achieved."""

    problems: int
    accuracy: float
    tokens_per_forward: float
    tokens_per_s: float
    wrong: tuple[tuple[Problem, str], ...]
    """The failures, to look at."""


def evaluate(engine: LocalEngine, tokenizer: Tokenizer, params: GenerationParams, count: int, seed: int) -> Score:
    """Solve `count` problems of the evaluation split, one at a time."""
    tokens = forwards = 0
    wrong = []
    began = time.perf_counter()
    for problem in itertools.islice(problems("eval", seed), count):
        prompt = tokenizer.encode(problem.question, add_special_tokens=False).ids
        generation = engine.generate(prompt, params)
        text = tokenizer.decode(generation.token_ids)
        tokens += len(generation.token_ids)
        forwards += generation.forwards
        if not is_correct(text, problem.answer):
            wrong.append((problem, text))
    seconds = time.perf_counter() - began
    return Score(count, 1 - len(wrong) / count, tokens / forwards, tokens / seconds, tuple(wrong))
