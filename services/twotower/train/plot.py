"""Plots the loss of a run."""

from __future__ import annotations

import importlib.util
import json
from itertools import accumulate
from pathlib import Path

SMOOTHING = 0.9
"""The decay of the exponential average that is drawn through the logged losses."""


def can_plot() -> bool:
    """Whether matplotlib is installed (``pip install -e '.[train]'``)."""
    return importlib.util.find_spec("matplotlib") is not None


def plot_loss(metrics: Path, out: Path) -> None:
    """Draw loss over tokens from a run's metrics.jsonl as PNG; without log entries, draw nothing."""
    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()] if metrics.exists() else []
    if not rows:
        return
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    tokens, losses = [row["tokens"] / 1e6 for row in rows], [row["loss"] for row in rows]
    smooth = list(accumulate(losses, lambda mean, loss: SMOOTHING * mean + (1 - SMOOTHING) * loss))
    figure, axes = plt.subplots(figsize=(7.5, 4.0), layout="constrained")
    axes.plot(tokens, losses, alpha=0.3, linewidth=0.8, color="tab:blue")
    axes.plot(tokens, smooth, color="tab:blue")
    axes.set_yscale("log")
    axes.set_xlabel("million tokens")
    axes.set_ylabel("loss")
    axes.grid(alpha=0.25, which="both")
    axes.set_title(f"{rows[-1]['step']:,} steps, {rows[-1]['seconds'] / 60:.0f} minutes, loss {smooth[-1]:.4f}", fontsize=10)
    figure.savefig(out, dpi=120)
    plt.close(figure)
