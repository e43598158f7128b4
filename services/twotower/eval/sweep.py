"""The trade-off between quality and speed: gamma, steps and block size, varied one at a time."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from twotower.errors import ConfigError
from twotower.eval.measure import Comparison, Evaluation, Score
from twotower.request import GenerationParams

GAMMAS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
STEPS = (2, 4, 8, 16)
BLOCK_SIZES = (4, 8, 16, 32, 64)
GOOD = 0.9
"""Share of AR's accuracy above which a setting appears in the enlarged plot."""


@dataclass(frozen=True, slots=True)
class Point:
    """One setting and its result."""

    varied: str
    """The varied setting: gamma, steps or block_size."""
    value: float
    score: Score
    accuracy_ar: float
    speedup: float
    """Tokens a second over AR's at the same batch, measured in the same run."""

    def as_json(self) -> dict[str, Any]:
        """The point for JSON."""
        return {"varied": self.varied, "value": self.value, "speedup": round(self.speedup, 3), **self.score.as_json()}


def sweep(evaluation: Evaluation, base: Comparison, report: Callable[[Point], None]) -> list[Point]:
    """Every setting over the evaluation's problems; `report` is called with each point as it is ready."""
    params = evaluation.params
    settings = [
        *(("gamma", value, dataclasses.replace(params, gamma=value)) for value in GAMMAS),
        *(("steps", value, dataclasses.replace(params, steps=value)) for value in STEPS),
        *(("block_size", value, dataclasses.replace(params, block_size=value, steps=value)) for value in BLOCK_SIZES),
    ]
    points = []
    for varied, value, setting in settings:
        score, ar = evaluation.diffusion(setting, base.batch)
        points.append(Point(varied, value, score, base.ar.accuracy, score.tokens_per_s / ar.tokens_per_s))
        report(points[-1])
    return points


def table(points: Sequence[Point], params: GenerationParams, trained_block: int) -> str:
    """The sweep as a Markdown table."""
    base = f"gamma {params.gamma:g}, {params.steps} steps, block {params.block_size} (trained: {trained_block})"
    lines = [
        f"One setting varied at a time from {base}.",
        "",
        "| varied | value | accuracy | retention | tokens/forward | speedup over AR |",
        "|---|---|---|---|---|---|",
    ]
    for point in points:
        kept = point.score.accuracy / point.accuracy_ar if point.accuracy_ar else float("nan")
        lines.append(
            f"| {point.varied} | {point.value:g} | {point.score.accuracy:.1%} | {kept:.1%} "
            f"| {point.score.tokens_per_forward:.2f} | {point.speedup:.2f}x |"
        )
    return "\n".join(lines) + "\n"


def require_matplotlib() -> None:
    """Raise ConfigError if plots cannot be drawn here. Call it before the work rather than after."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("plots need matplotlib: pip install -e '.[train]'")


def plot(points: Sequence[Point], accuracy_ar: float, path: Path) -> None:
    """Plot accuracy over speedup, with a line for each varied setting and AR at speedup 1, and the good settings enlarged.

    Raises ConfigError without matplotlib.
    """
    require_matplotlib()
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    good = [point for point in points if point.score.accuracy >= GOOD * accuracy_ar]
    figure, (whole, close) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for axes, shown in ((whole, points), (close, good)):
        for varied, marker in (("gamma", "o"), ("steps", "s"), ("block_size", "^")):
            line = [point for point in shown if point.varied == varied]
            xs, ys = [point.speedup for point in line], [100 * point.score.accuracy for point in line]
            axes.plot(xs, ys, marker=marker, label=varied.replace("_", " "), alpha=0.85)
            if axes is close or varied == "block_size":
                for point, x, y in zip(line, xs, ys, strict=True):
                    axes.annotate(f"{point.value:g}", (x, y), textcoords="offset points", xytext=(5, 5), fontsize=8)
        axes.axhline(100 * accuracy_ar, color="black", linewidth=0.6, linestyle=":")
        axes.set_xlabel("tokens a second, over AR")
        axes.grid(alpha=0.25)
    whole.plot([1.0], [100 * accuracy_ar], marker="*", markersize=14, linestyle="", color="black", label="AR")
    whole.set_ylabel("problems solved, %")
    whole.set_ylim(bottom=0)
    whole.legend()
    close.set_title("those near AR's quality", fontsize=10)
    figure.savefig(path, dpi=120)
    plt.close(figure)
