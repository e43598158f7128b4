"""Solves problems in all modes, in turns, and scores them."""

from __future__ import annotations

import dataclasses
import itertools
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from twotower.engine.batch import Completion, generate_batch
from twotower.engine.local import LocalEngine
from twotower.errors import CheckpointError
from twotower.eval.config import AMONG, AR_EVERY, EvalConfig
from twotower.request import GenerationParams, Mode, check_request
from twotower.text.tokenizer import Tokenizer
from twotower.train.families.answers import is_degenerate
from twotower.train.families.item import Check, Item
from twotower.train.families.registry import TASKS

TUNED_ON = 6
"""Problems on which settings are compared."""


@dataclass(slots=True)
class Score:
    """What a mode achieved, over all problems."""

    solved: int = 0
    degenerate: int = 0
    """Texts that repeat a short piece over and over: wrong, whatever their answer."""
    problems: int = 0
    tokens: int = 0
    forwards: int = 0
    rounds: int = 0
    accepted: int = 0
    """Drafted tokens, in speculative mode."""
    seconds: float = 0.0
    latencies: list[float] = field(default_factory=list)
    first_blocks: list[float] = field(default_factory=list)

    right: dict[int, bool] = field(default_factory=dict)
    """By problem."""

    def add(self, result: Completion, text: str, check: Check, problem: int) -> None:
        """Count one solution, of the problem with this number."""
        degenerate = is_degenerate(text)
        self.right[problem] = check.passes(text) and not degenerate
        self.problems += 1
        self.solved += self.right[problem]
        self.degenerate += degenerate
        self.tokens += len(result.token_ids)
        self.forwards += result.forwards
        self.rounds += result.rounds
        self.accepted += result.use.accepted
        self.latencies.append(result.seconds)
        self.first_blocks.append(result.first_block_s)

    @property
    def accuracy(self) -> float:
        """Share of problems solved."""
        return self.solved / self.problems

    @property
    def tokens_per_s(self) -> float:
        """Tokens of all problems over the time of all."""
        return self.tokens / self.seconds

    @property
    def tokens_per_forward(self) -> float:
        """Of the denoiser; in AR mode 1."""
        return self.tokens / self.forwards if self.forwards else float("nan")

    @property
    def tokens_per_round(self) -> float:
        """In speculative mode: what drafts earn, and the token that follows them."""
        return (self.accepted + self.rounds) / self.rounds if self.rounds else float("nan")

    def as_json(self) -> dict[str, Any]:
        """All of it, rounded for reading."""
        return {
            "accuracy": round(self.accuracy, 4),
            "tokens_per_s": round(self.tokens_per_s, 2),
            "tokens_per_forward": round(self.tokens_per_forward, 3),
            "problems": self.problems,
            "degenerate": self.degenerate,
            "tokens_per_solution": round(self.tokens / self.problems, 1),
            "latency_p50_s": round(_quantile(self.latencies, 50), 4),
            "latency_p95_s": round(_quantile(self.latencies, 95), 4),
            "first_block_p50_s": round(_quantile(self.first_blocks, 50), 4),
        }


@dataclass(frozen=True, slots=True)
class Settings:
    """How the engine runs a mode."""

    threads: int
    """CPU threads."""
    compiled: bool
    """Compiled graphs instead of the plain forward."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """All modes at one batch size, measured in turns."""

    batch: int
    ar: Score
    diffusion: Score
    speculative: Score
    ar_settings: Settings
    diffusion_settings: Settings
    speculative_settings: Settings

    @property
    def retention(self) -> float:
        """Accuracy kept by diffusion, of AR's."""
        return self.diffusion.accuracy / self.ar.accuracy if self.ar.accuracy else float("nan")

    @property
    def speedup(self) -> float:
        """Tokens a second over AR's."""
        return self.diffusion.tokens_per_s / self.ar.tokens_per_s

    @property
    def speculative_speedup(self) -> float:
        """Tokens a second of speculative mode over AR's."""
        return self.speculative.tokens_per_s / self.ar.tokens_per_s

    def as_json(self) -> dict[str, Any]:
        """As `twotower eval --json` prints it."""
        return {
            "batch": self.batch,
            "ar": {**self.ar.as_json(), **dataclasses.asdict(self.ar_settings)},
            "diffusion": {**self.diffusion.as_json(), **dataclasses.asdict(self.diffusion_settings)},
            "speculative": {
                **self.speculative.as_json(),
                **dataclasses.asdict(self.speculative_settings),
                "tokens_per_round": round(self.speculative.tokens_per_round, 2),
                "speedup": round(self.speculative_speedup, 3),
            },
            "retention": round(self.retention, 4),
            "speedup": round(self.speedup, 3),
        }


class Evaluation:
    """A checkpoint, and the problems to solve with it."""

    def __init__(self, config: EvalConfig, engine: LocalEngine | None = None) -> None:
        """Load both towers, unless an engine has them already. Raises TwoTowerError."""
        self.engine = engine or LocalEngine(
            config.checkpoint,
            dtype=config.dtype,
            device=config.device,
            kernels=config.kernels,
            experts=config.experts,
            context_experts=config.context_experts,
        )
        path = self.engine.checkpoint.tokenizer_path
        if path is None:
            raise CheckpointError(f"{config.checkpoint} has no tokenizer.json, which problems in words need")
        self.tokenizer = Tokenizer.load(path)
        [tasks] = (tasks for tasks in TASKS.values() if config.family in tasks.families)
        stream = tasks.families[config.family]("eval", config.seed, tasks.max_number)
        self.problems: list[Item] = list(itertools.islice(stream, config.problems))
        self.prompts = [self.tokenizer.encode(problem.prompt) for problem in self.problems]
        self.settings: dict[tuple[Mode, int], Settings] = {}
        """The engine's settings by mode and batch."""
        self._threads = (config.threads,) if config.threads is not None else _thread_counts()
        self._compiled = (config.compiled,) if config.compiled is not None else (False, True)
        eos = config.params.eos_token_ids or self.engine.limits.eos_token_ids
        self.params = dataclasses.replace(config.params, eos_token_ids=eos)
        check_request(self.prompts[0], self.params, self.engine.limits)

    def tune(self, mode: Mode, batch: int) -> Settings:
        """The engine's fastest settings for a mode and batch, found out on the first problems."""
        if (mode, batch) not in self.settings:
            first = self._compiled[0]
            timed = {s: self._time(mode, batch, s) for s in (Settings(threads, first) for threads in self._threads)}
            if len(self._compiled) > 1 and batch == 1:  # graphs are for single requests, and take a while to make
                best = dataclasses.replace(min(timed, key=timed.__getitem__), compiled=True)
                timed[best] = self._time(mode, batch, best)
            self.settings[mode, batch] = min(timed, key=timed.__getitem__)
        return self.settings[mode, batch]

    def _time(self, mode: Mode, batch: int, settings: Settings) -> float:
        """Seconds for the first problems: the faster of two rounds, after one that is not counted."""
        seconds = []
        for _ in range(3):
            score = Score()
            self._solve(score, mode, self.params, settings, range(min(TUNED_ON, len(self.problems))), batch)
            seconds.append(score.seconds)
        return min(seconds[1:])

    def compare(self, batch: int) -> Comparison:
        """All modes over all problems, in turns, each with its best settings."""
        ar, diffusion, speculative = Score(), Score(), Score()
        scores = ((Mode.AR, ar), (Mode.DIFFUSION, diffusion), (Mode.SPECULATIVE, speculative))
        turns = [(mode, score, self.tune(mode, batch)) for mode, score in scores]
        for start in range(0, len(self.problems), AMONG):
            part = range(start, min(start + AMONG, len(self.problems)))
            for mode, score, settings in turns:
                self._solve(score, mode, self.params, settings, part, batch)
        return Comparison(batch, ar, diffusion, speculative, *(settings for _, _, settings in turns))

    def diffusion(self, params: GenerationParams, batch: int) -> tuple[Score, Score]:
        """One setting of the diffusion mode over all problems, and AR over some of them in between, for its speed."""
        score, ar = Score(), Score()
        params = dataclasses.replace(params, eos_token_ids=self.params.eos_token_ids)
        settings, ar_settings = self.tune(Mode.DIFFUSION, batch), self.tune(Mode.AR, batch)
        self._solve(Score(), Mode.DIFFUSION, params, settings, range(min(2, len(self.problems))), batch)  # may compile anew
        for i, start in enumerate(range(0, len(self.problems), AMONG)):
            part = range(start, min(start + AMONG, len(self.problems)))
            if i % AR_EVERY == 0:
                self._solve(ar, Mode.AR, self.params, ar_settings, part, batch)
            self._solve(score, Mode.DIFFUSION, params, settings, part, batch)
        return score, ar

    def _solve(
        self, score: Score, mode: Mode, params: GenerationParams, settings: Settings, which: Sequence[int], batch: int
    ) -> None:
        # In speculative mode drafts take what they earn; a setting of the diffusion mode is none of theirs.
        steps = 0 if mode is Mode.SPECULATIVE else params.steps
        params = dataclasses.replace(params, mode=mode, steps=steps)
        engine, prompts = self.engine, [self.prompts[i] for i in which]
        torch.set_num_threads(settings.threads)
        engine.context.tower.compiled = engine.denoiser.tower.compiled = settings.compiled
        started = time.perf_counter()
        results = list(generate_batch(engine.context, engine.denoiser, prompts, params, batch))
        score.seconds += time.perf_counter() - started
        for result in results:
            problem = which[result.index]
            score.add(result, self.tokenizer.decode(result.token_ids), self.problems[problem].check, problem)


def _thread_counts() -> tuple[int, ...]:
    """One, a half and all of the CPUs this process may use."""
    cpus = len(os.sched_getaffinity(0))
    return tuple(sorted({1, max(1, cpus // 2), cpus}))


def _quantile(values: Sequence[float], percent: int) -> float:
    """With linear interpolation; of a single value, itself."""
    if len(values) < 2:
        return values[0] if values else float("nan")
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]
