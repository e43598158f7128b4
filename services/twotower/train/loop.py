"""What both trainers share: the loop with its schedule, log, and checkpoints to resume from."""

from __future__ import annotations

import json
import math
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from twotower.errors import ConfigError, LossNotFinite
from twotower.train.batches import Place
from twotower.train.forward import Usage
from twotower.train.optim import OptimConfig, Optimizer

STATE_FILE = "state.pt"
METRICS_FILE = "metrics.jsonl"

_ROUTER_BIAS = re.compile(r"layers\.(\d+)\.mixer\.gate\.e_score_correction_bias$")


@dataclass(frozen=True, slots=True)
class LoopConfig:
    """How long to train, and how often to log and save."""

    steps: int
    minutes: float = math.inf
    """Stop after this time of training too, whichever comes first; the schedule follows the nearer end."""
    warmup: float = 0.03
    """Share of the run in which the learning rate rises."""
    ema: float = 0.998
    """Decay a step of the averaged weights, which are what is exported; shorter in the first steps."""
    balance: float = 1e-3
    """Step of the routers' correction bias toward the experts that are used too little."""
    log_every: int = 20
    save_minutes: float = 3.0
    bf16: bool = True
    """Matrix products in bf16 (autocast); the scan, norms and the loss stay fp32."""
    seed: int = 0
    optim: OptimConfig = field(default_factory=OptimConfig)


class Task(Protocol):
    """What differs between the two trainers."""

    @property
    def model(self) -> nn.Module:
        """What is trained."""

    def batches(self, place: Place) -> Iterator[Any]:
        """The stream of batches from `place` on."""

    def loss(self, batch: Any, generator: torch.Generator, usage: Usage) -> tuple[Tensor, int]:
        """The loss of a batch, and its number of tokens. Randomness comes from the generator alone."""


@dataclass(slots=True)
class Progress:
    """Where a run is."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0


class Loop:
    """Trains a task until its end, or from where an interrupted run stopped."""

    def __init__(
        self, task: Task, config: LoopConfig, run_dir: Path, also: Callable[[dict[str, Tensor]], None] | None = None
    ) -> None:
        """also: called with the averaged weights whenever the state is saved."""
        self._also = also
        self.task, self.config, self.run_dir = task, config, run_dir
        self.progress, self.place = Progress(), Place()
        self.optimizer = Optimizer(task.model, config.optim)
        self.ema = {name: p.detach().clone() for name, p in task.model.named_parameters()}
        biases = ((_ROUTER_BIAS.search(name), p) for name, p in task.model.named_parameters())
        self._biases = {int(found[1]): p for found, p in biases if found}
        run_dir.mkdir(parents=True, exist_ok=True)
        if (run_dir / STATE_FILE).exists():
            self._resume()

    def run(self, stop_at: int | None = None) -> None:
        """Train to the end (or to step `stop_at`), then save. Raises LossNotFinite."""
        config, progress = self.config, self.progress
        batches = self.task.batches(self.place)
        last_save = last_log = last_step = time.monotonic()
        tokens = 0
        losses: list[Tensor] = []
        while not self._ended() and (stop_at is None or progress.step < stop_at):
            loss, norm, count = self._step(next(batches))
            progress.step += 1
            progress.tokens += count
            now = time.monotonic()
            progress.seconds, last_step = progress.seconds + now - last_step, now
            losses.append(loss)
            tokens += count
            if progress.step % config.log_every == 0:
                self._log(self._mean(losses), norm.item(), tokens / (now - last_log))
                losses, tokens, last_log = [], 0, now
            if time.monotonic() - last_save > 60 * config.save_minutes:
                self._mean(losses)
                self.save()
                last_save = time.monotonic()
        self._mean(losses)
        self.save()

    def _mean(self, losses: list[Tensor]) -> float:
        """Of the latest steps. Raises LossNotFinite: a GPU is not asked after every step, but before anything is saved."""
        mean = torch.stack(losses).mean().item() if losses else 0.0
        if not math.isfinite(mean):
            raise self._not_finite(mean)
        return mean

    def _not_finite(self, loss: float) -> LossNotFinite:
        return LossNotFinite(f"loss is {loss} at step {self.progress.step}; the last good state is in {self.run_dir}")

    def _step(self, batch: Any) -> tuple[Tensor, Tensor, int]:
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + self.progress.step)
        usage = Usage()
        loss, count = self.task.loss(batch, generator, usage)
        if loss.device.type == "cpu" and not math.isfinite(loss.item()):
            raise self._not_finite(loss.item())
        loss.backward()
        norm = self.optimizer.step(self._schedule())
        self._balance(usage)
        decay = min(self.config.ema, (1 + self.progress.step) / (10 + self.progress.step))
        with torch.no_grad():
            names = list(self.ema)
            current = [p.detach() for _, p in self.task.model.named_parameters()]
            torch._foreach_lerp_([self.ema[n] for n in names], current, 1 - decay)
        return loss.detach(), norm, count

    def _balance(self, usage: Usage) -> None:
        """Auxiliary-loss-free balancing: experts that get less than their share become easier to choose."""
        for i, counts in usage.counts.items():
            load = counts.float()
            self._biases[i].data.add_(torch.sign(load.mean() - load), alpha=self.config.balance)

    def _share(self) -> float:
        """How much of the run is done, in [0, 1]."""
        return min(1.0, max(self.progress.step / self.config.steps, self.progress.seconds / 60 / self.config.minutes))

    def _ended(self) -> bool:
        return self._share() >= 1.0

    def _schedule(self) -> float:
        """Linear warmup, then a cosine down to a hundredth."""
        share, warmup = self._share(), self.config.warmup
        if share < warmup:
            return max(share, 1e-3) / warmup
        return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (share - warmup) / (1 - warmup)))

    def _log(self, loss: float, norm: float, rate: float) -> None:
        p, share = self.progress, self._share()
        eta = p.seconds * (1 - share) / max(share, 1e-9)
        row = {**asdict(p), "loss": loss, "grad_norm": norm, "lr_scale": self._schedule(), "tokens_per_s": rate}
        with (self.run_dir / METRICS_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        bar = "#" * round(20 * share)
        print(
            f"[{bar:20}] step {p.step}  loss {loss:.4f}  {rate:,.0f} tokens/s  {p.seconds / 60:.1f} min, {eta / 60:.1f} to go",
            file=sys.stderr,
            flush=True,
        )

    def save(self) -> None:
        """Write the state of the run, whole or not at all; and what else is to be written as often."""
        state = {
            "model": self.task.model.state_dict(),
            "ema": self.ema,
            "optimizer": self.optimizer.state_dict(),
            "progress": asdict(self.progress),
            "place": asdict(self.place),
        }
        part = self.run_dir / (STATE_FILE + ".part")
        torch.save(state, part)
        part.replace(self.run_dir / STATE_FILE)
        if self._also is not None:
            self._also(self.ema)

    def _resume(self) -> None:
        state = torch.load(self.run_dir / STATE_FILE, map_location="cpu", weights_only=True)
        ours = {name: value.shape for name, value in self.task.model.state_dict().items()}
        if (theirs := {name: value.shape for name, value in state["model"].items()}) != ours:
            differs = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
            raise ConfigError(
                f"run_dir: {self.run_dir} holds the run of another model, which differs in {len(differs)} tensors,"
                f" such as {differs[0]}; give another directory, or remove this one"
            )
        self.task.model.load_state_dict(state["model"])
        for name, value in state["ema"].items():
            self.ema[name].copy_(value)
        self.optimizer.load_state_dict(state["optimizer"])
        self.progress, self.place = Progress(**state["progress"]), Place(**state["place"])
        self._forget_what_follows()

    def _forget_what_follows(self) -> None:
        """Drop what was logged after the state was saved: those steps are taken again."""
        path = self.run_dir / METRICS_FILE
        if path.exists():
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= self.progress.step]
            path.write_text("".join(kept), encoding="utf-8")
