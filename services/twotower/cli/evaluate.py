"""`twotower eval`: quality and speed of all modes, on problems no training has seen."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from twotower.cli.options import add_checkpoint, add_experts, add_place
from twotower.errors import ConfigError

if TYPE_CHECKING:
    from twotower.eval.config import EvalConfig
    from twotower.eval.measure import Comparison, Settings
    from twotower.eval.sweep import Point


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "eval", help="measure quality and speed, AR against diffusion and speculative", allow_abbrev=False
    )
    add_checkpoint(parser)
    parser.add_argument("--seed", type=int, default=1, metavar="S", help="of the problems, none of which training has seen")
    parser.add_argument("--problems", type=int, default=200, metavar="N", help="default 200")
    parser.add_argument(
        "--batch", type=int, nargs="+", default=[1], metavar="B", help="requests in flight; first: the headline"
    )
    parser.add_argument("--gamma", type=float, default=0.8, metavar="G", help="default 0.8")
    parser.add_argument("--block-size", type=int, metavar="L", help="default: the checkpoint's")
    parser.add_argument("--steps", type=int, metavar="T", help="default: the block size")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="X", help="default 0")
    parser.add_argument("--max-tokens", type=int, default=256, metavar="N", help="default 256")
    add_place(parser)
    add_experts(parser)
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: the fastest for each mode)")
    parser.add_argument(
        "--compile",
        choices=("auto", "yes", "no"),
        default="auto",
        help="compiled graphs at batch 1 (auto: whatever is faster for each mode)",
    )
    parser.add_argument("--sweep", action="store_true", help="vary gamma, steps and block size as well")
    parser.add_argument(
        "--suite",
        nargs="*",
        choices=("stories", "math", "code", "knowledge"),
        metavar="FAMILY",
        help="a table of several families, with intervals (default: math code knowledge)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("eval"),
        metavar="DIR",
        help="where --sweep writes sweep.md and sweep.png, and --suite writes suite.md",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Measure and print."""
    from twotower.eval.config import EvalConfig
    from twotower.eval.measure import Evaluation
    from twotower.model.checkpoint import Checkpoint
    from twotower.request import GenerationParams

    trained = Checkpoint.open(args.checkpoint).limits.block_size
    block_size = trained if args.block_size is None else args.block_size
    params = GenerationParams(
        max_tokens=args.max_tokens,
        block_size=block_size,
        steps=block_size if args.steps is None else args.steps,
        gamma=args.gamma,
        temperature=args.temperature,
    )
    config = EvalConfig(
        checkpoint=args.checkpoint,
        seed=args.seed,
        problems=args.problems,
        batches=tuple(args.batch),
        params=params,
        dtype=args.dtype,
        device=args.device,
        kernels=args.kernels,
        experts=args.experts,
        context_experts=args.context_experts,
        threads=args.threads,
        compiled={"auto": None, "yes": True, "no": False}[args.compile],
    )
    if args.suite is not None:
        _suite(args, config)
        return
    if args.sweep:
        from twotower.eval.sweep import plot, require_matplotlib, sweep, table

        require_matplotlib()
    evaluation = Evaluation(config)
    comparisons = []
    for batch in config.batches:
        comparisons.append(evaluation.compare(batch))
        print(_row(comparisons[-1]), file=sys.stderr if args.json else sys.stdout, flush=True)
    points: list[Point] = []
    if args.sweep:
        points = sweep(evaluation, comparisons[0], lambda point: print(_point(point), file=sys.stderr, flush=True))
        args.out.mkdir(parents=True, exist_ok=True)
        written = table(points, evaluation.params, evaluation.engine.limits.block_size)
        (args.out / "sweep.md").write_text(written, encoding="utf-8")
        plot(points, comparisons[0].ar.accuracy, args.out / "sweep.png")
        print(f"wrote {args.out / 'sweep.md'} and {args.out / 'sweep.png'}", file=sys.stderr)
    if args.json:
        settings = {"seed": args.seed, "gamma": args.gamma, "block_size": block_size, "steps": params.steps}
        precision = {"experts": args.experts, "context_experts": args.context_experts or args.experts}
        place = {**precision, "dtype": args.dtype, "device": str(evaluation.engine.context.tower.device)}
        headline, *others = [comparison.as_json() for comparison in comparisons]
        extra = {"sweep": [point.as_json() for point in points]} if points else {}
        print(json.dumps({**headline, "batches": others, "settings": {**settings, **place}, **extra}))


def _suite(args: argparse.Namespace, config: EvalConfig) -> None:
    from twotower.eval.config import SUITE
    from twotower.eval.suite import run_suite, table

    if args.sweep:
        raise ConfigError("suite: --sweep varies the settings of one family; leave one of the two out")
    rows = run_suite(config, args.suite or SUITE, lambda row: print(table([row]).splitlines()[-1], file=sys.stderr, flush=True))
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "suite.md").write_text(table(rows), encoding="utf-8")
    print(json.dumps({"rows": [row.as_json() for row in rows]}) if args.json else table(rows), end="\n" if args.json else "")


def _row(c: Comparison) -> str:
    ar, diffusion = c.ar, c.diffusion
    return (
        f"batch {c.batch}: AR {ar.accuracy:.1%} at {ar.tokens_per_s:,.0f} tokens/s; "
        f"diffusion {diffusion.accuracy:.1%} at {diffusion.tokens_per_s:,.0f} tokens/s, "
        f"{diffusion.tokens_per_forward:.2f} tokens a forward; "
        f"retention {c.retention:.1%}, speedup {c.speedup:.2f}x; "
        f"speculative {c.speculative.accuracy:.1%} at {c.speculative.tokens_per_s:,.0f} tokens/s, "
        f"{c.speculative.tokens_per_round:.1f} tokens a round, speedup {c.speculative_speedup:.2f}x ({ar.problems} problems; "
        f"AR {_settings(c.ar_settings)}, diffusion {_settings(c.diffusion_settings)})"
    )


def _settings(s: Settings) -> str:
    return f"{'compiled' if s.compiled else 'eager'} on {s.threads} thread{'' if s.threads == 1 else 's'}"


def _point(point: Point) -> str:
    return (
        f"{point.varied} {point.value:g}: {point.score.accuracy:.1%}, {point.score.tokens_per_forward:.2f} tokens a forward, "
        f"{point.speedup:.2f}x"
    )
