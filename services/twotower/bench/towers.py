"""Each tower's steps at any size, with random weights: a denoiser step, a commit, an AR step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from twotower.bench.baseline import make_plain
from twotower.bench.clock import seconds_of
from twotower.bench.costs import Costs, least_seconds, total
from twotower.bench.random_tower import random_states, random_tower
from twotower.bench.roofline import Cost, Roofline
from twotower.bench.speedup import StepTimes
from twotower.engine.context_engine import ContextEngine
from twotower.engine.denoiser_engine import DenoiserEngine
from twotower.model.config import ModelConfig
from twotower.model.context_tower import ContextTower
from twotower.model.denoiser_tower import DenoiserTower
from twotower.model.layers import Router
from twotower.model.state import ContextState
from twotower.request import GenerationParams

STEPS = ("denoiser", "commit", "ar")


@dataclass(frozen=True, slots=True)
class TowerRow:
    """The result of one step at one size."""

    step: str
    batch: int
    context: int
    cost: Cost
    """The step's cost, with the experts that were drawn, else with the expected number."""
    least_s: float
    """The least time that the roofline allows."""
    seconds: float | None = None
    """Measured, by the host's clock."""
    plain_s: float | None = None
    """The time with a loop over experts, as in the published script, and torch alone."""
    experts: tuple[float, float] | None = None
    """How many experts a layer was expected to need, and how many it needed on average."""

    @property
    def share(self) -> float | None:
        """The share of the roofline that is reached."""
        return None if self.seconds is None else self.least_s / self.seconds

    def as_json(self) -> dict[str, Any]:
        """The row for JSON."""
        return {**dataclasses.asdict(self), "share": self.share}


def computed(
    config: ModelConfig, experts: str, roofline: Roofline, batches: Sequence[int], contexts: Sequence[int]
) -> list[TowerRow]:
    """The least times of steps that a roofline allows, for tokens that choose their experts at random."""
    costs = Costs(config, experts)
    return [_row(costs, roofline, step, batch, context) for step in STEPS for batch in batches for context in contexts]


def _row(costs: Costs, roofline: Roofline, step: str, batch: int, context: int) -> TowerRow:
    count = {"denoiser": costs.denoiser_step, "commit": costs.commit, "ar": costs.ar_step}[step]
    counts = count(batch, context)
    return TowerRow(step, batch, context, total(counts), least_seconds(counts, roofline))


def times(rows: Sequence[TowerRow], block: int) -> list[StepTimes]:
    """The measured step times, else the computed ones, for the sizes at which all three steps are known."""
    by_size: dict[tuple[int, int], dict[str, float]] = {}
    for row in rows:
        by_size.setdefault((row.batch, row.context), {})[row.step] = row.seconds or row.least_s
    return [StepTimes(*size, block, *(t[s] for s in STEPS)) for size, t in by_size.items() if len(t) == len(STEPS)]


class TowerBench:
    """Towers of one size on one device; only one is in memory at a time."""

    def __init__(
        self, config: ModelConfig, device: torch.device, experts: str, roofline: Roofline, budget_s: float, plain: bool
    ) -> None:
        self._config = config
        self._device = device
        self._experts = experts
        self._roofline = roofline
        self._budget_s = budget_s
        self._plain = plain and experts == "bf16"
        self.shared = False
        """Whether layers of one kind share their weights in the tower that was made last."""

    def rows(self, batches: Sequence[int], contexts: Sequence[int]) -> Iterator[TowerRow]:
        """All steps at all sizes, except those whose states memory cannot hold. Raises ConfigError."""
        sizes = [(batch, context) for batch in batches for context in contexts]
        for kind, steps in ((DenoiserTower, ("denoiser",)), (ContextTower, ("commit", "ar"))):
            yield from self._tower_rows(kind, steps, sizes)

    def _tower_rows(
        self, kind: type[DenoiserTower] | type[ContextTower], steps: Sequence[str], sizes: list[tuple[int, int]]
    ) -> Iterator[TowerRow]:
        tower, self.shared = random_tower(kind, self._config, torch.bfloat16, self._device, self._experts)
        rows = []
        for batch, context in sizes:
            for step in steps:
                seconds, drawn = self._measured(tower, step, batch, context)
                if seconds is None:
                    continue
                costs = Costs(self._config, self._experts, drawn)
                counts = None
                if drawn is not None:
                    counts = (costs.distinct(batch * (1 if step == "ar" else self._config.block_size)), drawn)
                row = _row(costs, self._roofline, step, batch, context)
                rows.append(dataclasses.replace(row, seconds=seconds, experts=counts))
                if not self._plain:
                    yield rows[-1]
        if self._plain:
            make_plain(tower)
            for row in rows:
                yield dataclasses.replace(row, plain_s=self._measured(tower, row.step, row.batch, row.context)[0])

    def _measured(
        self, tower: DenoiserTower | ContextTower, step: str, batch: int, context: int
    ) -> tuple[float | None, float | None]:
        """Seconds, and distinct experts a layer."""
        states = random_states(self._config, torch.bfloat16, self._device, batch, context)
        if states is None:
            return None, None
        with _Drawn(tower) as drawn:
            self._call(tower, step, states, graphs=False)()  # a captured graph would not call the code that counts
        return seconds_of(self._call(tower, step, states), self._device, self._budget_s, wall=True), drawn.mean

    def _call(
        self, tower: DenoiserTower | ContextTower, step: str, states: list[ContextState], *, graphs: bool | None = None
    ) -> Callable[[], object]:
        config, device = self._config, self._device
        length = 1 if step == "ar" else config.block_size
        tokens = torch.randint(config.vocab_size, (len(states), length), device=device, generator=self._generator())
        if isinstance(tower, DenoiserTower):
            engine, params = DenoiserEngine(tower, graphs=graphs), GenerationParams(block_size=length, steps=length)

            def step_once() -> None:
                blocks = [engine.start(params, state, 0) for state in states]
                known = length // 2  # as in the middle of a refinement, since masks alone would choose few experts
                for block, row in zip(blocks, tokens.cpu(), strict=True):
                    block.tokens[:known], block.masked[:known], block.left = row[:known], False, length - known
                engine.step(blocks)

            return step_once
        lengths, context, known_tokens = [state.length for state in states], ContextEngine(tower, graphs=graphs), tokens.cpu()

        def forward() -> Tensor | None:
            _, logits = context.extend(known_tokens, states, need_logits=step == "ar", need_deltas=step != "ar")
            for state, before in zip(states, lengths, strict=True):
                state.length = before  # so that the next call finds the same context
            return None if logits is None else logits.argmax(-1)

        return forward

    def _generator(self) -> torch.Generator:
        return torch.Generator(self._device).manual_seed(0)


class _Drawn:
    """Counts the experts that routers choose within the context."""

    def __init__(self, tower: nn.Module) -> None:
        self._counts: list[int] = []
        self._routers = [module for module in tower.modules() if isinstance(module, Router)]
        self._hooks: list[Any] = []

    @property
    def mean(self) -> float | None:
        """The mean number of distinct experts of a layer."""
        return sum(self._counts) / len(self._counts) if self._counts else None

    def __enter__(self) -> _Drawn:
        self._hooks = [router.register_forward_hook(self._count) for router in self._routers]
        return self

    def __exit__(self, *exc: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _count(self, router: nn.Module, args: tuple[Tensor, ...], chosen: tuple[Tensor, Tensor]) -> None:
        self._counts.append(chosen[0].unique().numel())
