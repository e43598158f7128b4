"""The suite: several families of tasks, both modes, with intervals, as one table.

The overall row is the mean over families with equal weights. Intervals are of 95 %: Wilson's for a share, and for the
retention a bootstrap over problems, each with its results in both modes.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from twotower.eval.config import EvalConfig
from twotower.eval.measure import Comparison, Evaluation

Z = 1.96
RESAMPLES = 2000

Interval = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Row:
    """The results of one family, or of all families, at a batch size."""

    family: str
    batch: int
    problems: int
    ar: float
    """Share of problems solved."""
    ar_interval: Interval
    diffusion: float
    diffusion_interval: Interval
    retention: float
    """The share of AR's accuracy that diffusion keeps."""
    retention_interval: Interval
    tokens_per_forward: float
    speedup: float
    """Tokens a second over AR's."""
    degenerate: int
    """Texts of diffusion that repeat a piece over and over; they count as wrong."""

    def as_json(self) -> dict[str, Any]:
        """The row for JSON; the retention is null if AR solves no problem."""
        fields = dataclasses.asdict(self)
        return fields if self.ar else {**fields, "retention": None, "retention_interval": None}


def run_suite(config: EvalConfig, families: Sequence[str], report: Callable[[Row], None]) -> list[Row]:
    """All families at each batch size, followed by their overall row; `report` is called with each row as it is ready."""
    evaluations: dict[str, Evaluation] = {}
    for family in families:
        engine = next(iter(evaluations.values())).engine if evaluations else None
        evaluations[family] = Evaluation(dataclasses.replace(config, family=family), engine)
    rows = []
    for batch in config.batches:
        comparisons = {}
        for family, evaluation in evaluations.items():
            comparisons[family] = evaluation.compare(batch)
            rows.append(_row(family, [comparisons[family]], config.seed))
            report(rows[-1])
        if len(families) > 1:
            rows.append(_row("overall", list(comparisons.values()), config.seed))
            report(rows[-1])
    return rows


def _row(family: str, comparisons: Sequence[Comparison], seed: int) -> Row:
    pairs = [[(c.ar.right[i], c.diffusion.right[i]) for i in sorted(c.ar.right)] for c in comparisons]
    ar, diffusion = (sum(_share(part, mode) for part in pairs) / len(pairs) for mode in (0, 1))
    count = sum(map(len, pairs))
    tokens, forwards = (sum(getattr(c.diffusion, name) for c in comparisons) for name in ("tokens", "forwards"))
    seconds, ar_seconds = sum(c.diffusion.seconds for c in comparisons), sum(c.ar.seconds for c in comparisons)
    return Row(
        family=family,
        batch=comparisons[0].batch,
        problems=count,
        ar=ar,
        ar_interval=wilson(ar, count),
        diffusion=diffusion,
        diffusion_interval=wilson(diffusion, count),
        retention=_ratio(diffusion, ar),
        retention_interval=retained(pairs, seed),
        tokens_per_forward=tokens / forwards,
        speedup=(tokens / seconds) / (sum(c.ar.tokens for c in comparisons) / ar_seconds),
        degenerate=sum(c.diffusion.degenerate for c in comparisons),
    )


def _share(pairs: Sequence[tuple[bool, bool]], mode: int) -> float:
    return sum(pair[mode] for pair in pairs) / len(pairs)


def _ratio(diffusion: float, ar: float) -> float:
    return diffusion / ar if ar else float("nan")


def wilson(share: float, count: int) -> Interval:
    """The 95 % interval of a share that was observed in `count` trials."""
    middle = (share + Z * Z / (2 * count)) / (1 + Z * Z / count)
    half = Z * (share * (1 - share) / count + Z * Z / (4 * count * count)) ** 0.5 / (1 + Z * Z / count)
    return max(0.0, middle - half), min(1.0, middle + half)


def retained(pairs: Sequence[Sequence[tuple[bool, bool]]], seed: int) -> Interval:
    """The 95 % interval of the retention, by a bootstrap within each family; NaN if AR solves no problem.

    pairs: for each family and problem, whether AR and diffusion solved it.
    """
    rng = random.Random(f"bootstrap:{seed}")
    ratios = []
    for _ in range(RESAMPLES):
        drawn = [rng.choices(part, k=len(part)) for part in pairs]
        ar, diffusion = (sum(_share(part, mode) for part in drawn) for mode in (0, 1))
        if ar:
            ratios.append(diffusion / ar)
    if not ratios:
        return float("nan"), float("nan")
    ratios.sort()
    return ratios[int(0.025 * len(ratios))], ratios[min(len(ratios) - 1, int(0.975 * len(ratios)))]


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| family | batch | problems | AR | diffusion | retention | tokens/forward | speedup over AR |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row.family} | {row.batch} | {row.problems} | {_shown(row.ar, row.ar_interval)} "
            f"| {_shown(row.diffusion, row.diffusion_interval)} | {_shown(row.retention, row.retention_interval)} "
            f"| {row.tokens_per_forward:.2f} | {row.speedup:.2f}x |"
        )
    return "\n".join(lines) + "\n"


def _shown(value: float, interval: Interval) -> str:
    return f"{value:.1%} ({interval[0]:.1%} to {interval[1]:.1%})"
