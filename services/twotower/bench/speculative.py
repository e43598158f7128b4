"""Speculative mode against AR and diffusion in one process: equal texts, and how fast they come, in turns."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch

from twotower.engine.batch import Completion, generate_batch
from twotower.engine.denoiser_engine import DenoiserEngine
from twotower.engine.effort import Times
from twotower.engine.local import LocalEngine
from twotower.engine.refinement import Refinement
from twotower.errors import CheckpointError
from twotower.request import GenerationParams, Mode
from twotower.text.tokenizer import Tokenizer
from twotower.train.families.stories.problems import problems

PART = 10
"""Texts after which the next mode has its turn: all see the same state of a noisy machine."""
MODES = (Mode.AR, Mode.DIFFUSION, Mode.SPECULATIVE)


@dataclass(slots=True)
class Run:
    """What one mode did."""

    tokens: int = 0
    seconds: float = 0.0
    rounds: int = 0
    forwards: int = 0
    context_forwards: int = 0
    accepted: int = 0
    texts: dict[int, list[int]] = field(default_factory=dict)

    def add(self, first: int, results: Iterable[Completion]) -> None:
        """Count texts, of which the first has this number."""
        for one in results:
            self.texts[first + one.index] = one.token_ids
            self.tokens += len(one.token_ids)
            self.rounds += one.rounds
            self.forwards += one.forwards
            self.context_forwards += one.use.context_forwards
            self.accepted += one.use.accepted

    @property
    def tokens_per_s(self) -> float:
        """Tokens of all texts over the time of all."""
        return self.tokens / self.seconds


@dataclass(frozen=True, slots=True)
class Row:
    """The modes at one batch size and temperature."""

    batch: int
    temperature: float
    runs: dict[Mode, Run]
    refused: Run | None
    """Speculative mode with a denoiser all of whose drafts are refused."""

    @property
    def equal(self) -> int:
        """Texts of speculative mode, with either denoiser, that are AR's."""
        others = [self.runs[Mode.SPECULATIVE], *([] if self.refused is None else [self.refused])]
        texts = self.runs[Mode.AR].texts
        return sum(all(other.texts[i] == text for other in others) for i, text in texts.items())

    def ratio(self, mode: Mode) -> float:
        """Tokens a second of speculative mode over those of another."""
        return self.runs[Mode.SPECULATIVE].tokens_per_s / self.runs[mode].tokens_per_s

    @property
    def refused_ratio(self) -> float | None:
        """Tokens a second over AR's where all drafts are refused."""
        return None if self.refused is None else self.refused.tokens_per_s / self.runs[Mode.AR].tokens_per_s


class _Refused(DenoiserEngine):
    """Computes as the real one does, and then proposes what no text holds: the mask."""

    def step(self, blocks: Iterable[Refinement]) -> None:
        """See `DenoiserEngine.step`."""
        blocks = list(blocks)
        super().step(blocks)
        for block in blocks:
            if block.done:
                block.tokens = torch.cat([block.tokens[:1], torch.full_like(block.tokens[1:], self.mask_id)])


def measure(
    engine: LocalEngine, *, texts: int, batch: int, temperature: float, max_tokens: int, seed: int, refused: bool
) -> Row:
    """The checkpoint's own word problems, none of which training has seen, in all modes in turns. Raises CheckpointError."""
    path = engine.checkpoint.tokenizer_path
    if path is None:
        raise CheckpointError(f"{engine.checkpoint.path} has no tokenizer.json, which problems in words need")
    tokenizer = Tokenizer.load(path)
    prompts = [tokenizer.encode(problem.question) for problem in itertools.islice(problems("eval", seed), texts)]
    params = GenerationParams(
        max_tokens=max_tokens,
        block_size=engine.limits.block_size,
        temperature=temperature,
        seed=seed,
        eos_token_ids=engine.limits.eos_token_ids,
    )
    bad = _Refused(engine.denoiser.tower)
    runs = {mode: Run() for mode in MODES}
    turns: list[tuple[Run, DenoiserEngine, GenerationParams]] = []
    for mode in MODES:
        steps = 0 if mode is Mode.SPECULATIVE else params.block_size
        turns.append((runs[mode], engine.denoiser, dataclasses.replace(params, mode=mode, steps=steps)))
    of_bad = Run() if refused else None
    if of_bad is not None:
        turns.append((of_bad, bad, dataclasses.replace(params, mode=Mode.SPECULATIVE, steps=0)))
    own = [Times() for _ in turns]  # what one denoiser earns says nothing about the other
    for times, (_, denoiser, one) in zip(own, turns, strict=True):  # what is used for the first time is slow
        engine.context.times = times
        list(generate_batch(engine.context, denoiser, prompts[:batch], one, batch))
    part = max(PART, 4 * batch)
    for first in range(0, texts, part):
        for times, (run, denoiser, one) in zip(own, turns, strict=True):
            engine.context.times = times
            started = time.perf_counter()
            results = list(generate_batch(engine.context, denoiser, prompts[first : first + part], one, batch))
            run.seconds += time.perf_counter() - started
            run.add(first, results)
    return Row(batch, temperature, runs, of_bad)


def table(rows: Sequence[Row]) -> str:
    """For people."""
    lines = [
        "| batch | temperature | texts equal | AR tokens/s | over AR | over diffusion | tokens a round | forwards a round "
        "| all refused, over AR |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        run, texts = row.runs[Mode.SPECULATIVE], len(row.runs[Mode.AR].texts)
        rounds = run.rounds or 1
        refused = "" if row.refused_ratio is None else f"{row.refused_ratio:.2f}"
        lines.append(
            f"| {row.batch} | {row.temperature:g} | {row.equal}/{texts} | {row.runs[Mode.AR].tokens_per_s:,.0f} "
            f"| {row.ratio(Mode.AR):.2f} | {row.ratio(Mode.DIFFUSION):.2f} | {(run.accepted + run.rounds) / rounds:.1f} "
            f"| {run.forwards / rounds:.2f} | {refused} |"
        )
    return "\n".join(lines)


def as_json(row: Row) -> dict[str, object]:
    """For machines."""
    return {
        "batch": row.batch,
        "temperature": row.temperature,
        "texts": len(row.runs[Mode.AR].texts),
        "equal": row.equal,
        "over_ar": round(row.ratio(Mode.AR), 3),
        "over_diffusion": round(row.ratio(Mode.DIFFUSION), 3),
        "refused_over_ar": None if row.refused_ratio is None else round(row.refused_ratio, 3),
        **{
            mode.value: {
                "tokens_per_s": round(run.tokens_per_s, 1),
                **{name: value for name, value in dataclasses.asdict(run).items() if name not in ("texts", "seconds")},
            }
            for mode, run in row.runs.items()
        },
    }
