"""The effect of routed experts in fewer bits: errors of weights and of experts' outputs, and changes of generated text."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from twotower.engine.batch import generate_batch
from twotower.errors import ConfigError
from twotower.eval.config import EvalConfig
from twotower.eval.measure import Evaluation
from twotower.model.experts import as_format
from twotower.model.layers import MoE
from twotower.request import Mode
from twotower.train.families.answers import is_degenerate
from twotower_kernels.experts import grouped_experts
from twotower_kernels.quant import RowError, dequantize, quantize, row_error

ROWS = 2048
"""The number of tokens, the first that pass through a layer, on which its experts' outputs are compared."""


@dataclass(frozen=True, slots=True)
class LayerError:
    """The errors of one MoE layer."""

    tower: str
    layer: int
    weights: RowError
    """Errors of the rows of both projections of all experts, each relative to the row's norm."""
    outputs: RowError
    """Errors of the weighted sums over a token's experts in fp32, with the inputs and routing of the unquantized run;
    relative to the root mean square of the sums, since relu2 leaves some close to zero."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """How far generations by unquantized and by quantized experts agree on the same prompts."""

    mode: str
    requests: int
    equal_tokens: float
    """Share of positions with the same token; if lengths differ, the longer one counts."""
    equal_generations: float
    """Share of requests whose tokens are all equal."""
    solved: tuple[float, float]
    """Share of problems solved: unquantized, quantized."""
    tokens_per_forward: tuple[float, float]


@dataclass(frozen=True, slots=True)
class PrecisionReport:
    """Quantized experts beside the checkpoint's own."""

    experts: str
    context_experts: str
    layers: list[LayerError]
    agreements: list[Agreement]

    def as_json(self) -> dict[str, Any]:
        """The report for JSON."""
        return dataclasses.asdict(self)


def report(config: EvalConfig, batch: int) -> PrecisionReport:
    """Compare `config.experts` with the unquantized experts on the problems of `config`. Raises TwoTowerError."""
    context = config.context_experts or config.experts
    plain = Evaluation(dataclasses.replace(config, experts="bf16", context_experts="bf16"))
    stored = plain.engine.checkpoint.config
    if {stored.context_experts, stored.denoiser_experts} != {"bf16"}:
        raise ConfigError("experts: the checkpoint is quantized already; errors are measured against the original")
    if {config.experts, context} <= {"auto", "bf16"}:
        raise ConfigError("experts: there is nothing to compare with bf16; choose fp8 or fp4")
    towers = {
        "context": (plain.engine.context.tower.context_tower, context),
        "denoiser": (plain.engine.denoiser.tower.denoiser_tower, config.experts),
    }
    with _recorded([tower for tower, _ in towers.values()]) as inputs:
        before = {mode: _generate(plain, mode, batch) for mode in (Mode.DIFFUSION, Mode.AR)}
    layers = [
        _layer_error(name, i, moe, inputs[moe], precision)
        for name, (tower, precision) in towers.items()
        for i, moe in _moe_layers(tower)
        if precision in ("fp8", "fp4")
    ]
    quantized = Evaluation(config)
    agreements = [_agreement(plain, mode, before[mode], _generate(quantized, mode, batch)) for mode in before]
    return PrecisionReport(config.experts, context, layers, agreements)


@dataclass(frozen=True, slots=True)
class _Run:
    tokens: list[list[int]]
    solved: float
    tokens_per_forward: float


def _generate(evaluation: Evaluation, mode: Mode, batch: int) -> _Run:
    engine, problems = evaluation.engine, evaluation.problems
    params = dataclasses.replace(evaluation.params, mode=mode)
    results = sorted(
        generate_batch(engine.context, engine.denoiser, evaluation.prompts, params, batch), key=lambda result: result.index
    )
    texts = [evaluation.tokenizer.decode(result.token_ids) for result in results]
    solved = sum(problem.check.passes(text) and not is_degenerate(text) for text, problem in zip(texts, problems, strict=True))
    tokens = sum(len(result.token_ids) for result in results)
    return _Run(
        [result.token_ids for result in results], solved / len(problems), tokens / sum(result.forwards for result in results)
    )


def _agreement(evaluation: Evaluation, mode: Mode, before: _Run, after: _Run) -> Agreement:
    pairs = list(zip(before.tokens, after.tokens, strict=True))
    equal = sum(a == b for one, other in pairs for a, b in zip(one, other, strict=False))
    return Agreement(
        mode.value,
        len(pairs),
        equal / sum(max(len(one), len(other)) for one, other in pairs),
        sum(one == other for one, other in pairs) / len(pairs),
        (before.solved, after.solved),
        (before.tokens_per_forward, after.tokens_per_forward),
    )


def _moe_layers(tower: nn.Module) -> Iterator[tuple[int, MoE]]:
    for i, layer in enumerate(tower.get_submodule("layers").children()):
        if isinstance(mixer := layer.get_submodule("mixer"), MoE):
            yield i, mixer


@contextmanager
def _recorded(towers: Sequence[nn.Module]) -> Iterator[dict[MoE, Tensor]]:
    """The first rows that pass through each MoE layer, (n, hidden), filled as they come."""
    seen: dict[MoE, Tensor] = {}

    def record(moe: nn.Module, args: tuple[Tensor, ...]) -> None:
        assert isinstance(moe, MoE)
        held = seen.get(moe)
        if held is None or held.shape[0] < ROWS:
            rows = args[0].flatten(0, -2)
            seen[moe] = (rows if held is None else torch.cat([held, rows]))[:ROWS].clone()

    hooks = [moe.register_forward_pre_hook(record) for tower in towers for _, moe in _moe_layers(tower)]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


@torch.inference_mode()
def _layer_error(tower: str, layer: int, moe: MoE, rows: Tensor, precision: str) -> LayerError:
    experts, weights = moe.gate(rows)
    exact = [matrix.float() for matrix in (moe.experts.up_proj, moe.experts.down_proj)]
    stored = [dequantize(quantize(matrix, as_format(precision))) for matrix in exact]
    errors = [row_error(near, far) for near, far in zip(stored, exact, strict=True)]
    counts = [matrix.shape[0] * matrix.shape[1] for matrix in exact]
    of_weights = RowError(
        sum(e.mean * n for e, n in zip(errors, counts, strict=True)) / sum(counts), max(e.max for e in errors)
    )
    outputs = [grouped_experts(rows.float(), experts, weights, *matrices) for matrices in (stored, exact)]
    return LayerError(tower, layer, of_weights, row_error(*outputs, typical=True))
