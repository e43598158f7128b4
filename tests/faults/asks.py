"""What the clients ask for: the shipped checkpoint's own word problems, in all the ways that share machinery."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from twotower.train.families.stories.problems import problems

MAX_TOKENS = 96


@dataclass(frozen=True, slots=True)
class Ask:
    """One request. `settings` have the same names over gRPC and HTTP; ``mode`` is a word."""

    prompt: str
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Answer:
    """What a request gave."""

    tokens: tuple[int, ...]
    text: str


def mixed(count: int, seed: int = 11) -> list[Ask]:
    """Short and long texts, greedy and sampled, all modes, and prompts that begin alike."""
    found = islice(problems("eval", seed), count + 4)
    preamble = "".join(f"{problem.question}\n{problem.solution}\n\n" for problem in islice(found, 4))
    asks = []
    for i, problem in enumerate(found):
        settings: dict[str, Any] = {"max_tokens": MAX_TOKENS}
        prompt = problem.question
        match i % 8:
            case 0 | 1:
                prompt = preamble + prompt
            case 2:
                settings |= {"mode": "ar"}
            case 3:
                settings |= {"temperature": 0.8, "seed": i}
            case 4:
                settings |= {"max_tokens": 3 * MAX_TOKENS, "ignore_eos": True}
            case 5:
                settings |= {"mode": "speculative", "temperature": 0.8 * (i // 8 % 2), "seed": i}
            case 6:
                settings |= {"mode": "speculative", "max_tokens": 2 * MAX_TOKENS, "ignore_eos": True}
        asks.append(Ask(prompt, settings))
    return asks


def alike(count: int, seed: int = 21) -> list[Ask]:
    """Prompts that begin with the same text of several hundred tokens, so that states are cached and restored."""
    found = islice(problems("eval", seed), count + 4)
    preamble = "".join(f"{problem.question}\n{problem.solution}\n\n" for problem in islice(found, 4))
    asks = [Ask(preamble + problem.question, {"max_tokens": MAX_TOKENS}) for problem in found]
    return asks + [Ask(ask.prompt, {**ask.settings, "mode": "ar"}) for ask in asks[: count // 10]]
