"""`twotower quantize`: writes a checkpoint with its routed experts in 8 or 4 bits, and measures what that changes."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twotower.cli.options import add_place, check_at_least_one
from twotower.errors import ConfigError

if TYPE_CHECKING:
    from twotower.eval.precision import PrecisionReport


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the command."""
    parser = commands.add_parser("quantize", help="store a checkpoint's routed experts in fp8 or fp4", allow_abbrev=False)
    parser.add_argument("checkpoint", type=Path, metavar="CKPT", help="checkpoint directory, not quantized")
    parser.add_argument("--experts", choices=("fp8", "fp4"), required=True, help="1, or about 0.56 bytes a weight")
    parser.add_argument("--tower", choices=("both", "context", "denoiser"), default="both", help="whose experts (default both)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write the checkpoint there")
    parser.add_argument("--report", action="store_true", help="compare it with the original on word problems")
    parser.add_argument("--problems", type=int, default=100, metavar="N", help="of the report (default 100)")
    parser.add_argument("--seed", type=int, default=1, metavar="S", help="of the problems")
    parser.add_argument("--batch", type=int, default=8, metavar="B", help="requests in flight (default 8)")
    parser.add_argument("--max-tokens", type=int, default=256, metavar="N", help="default 256")
    parser.add_argument("--gamma", type=float, default=0.8, metavar="G", help="default 0.8")
    add_place(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Write the checkpoint, compare, and print."""
    check_at_least_one(args, "problems", "batch", "max_tokens")
    if args.out is None and not args.report:
        raise ConfigError("out: give --out DIR, --report or both")
    result: dict[str, Any] = {"experts": args.experts, "tower": args.tower}
    if args.out is not None:
        from twotower.model.checkpoint import Checkpoint
        from twotower.model.quantize import quantize_checkpoint

        towers = ("context", "denoiser") if args.tower == "both" else (args.tower,)
        sizes = quantize_checkpoint(Checkpoint.open(args.checkpoint), args.out, args.experts, towers)
        identity = Checkpoint.open(args.out).identity
        result |= {"out": str(args.out), "identity": identity, **dataclasses.asdict(sizes)}
        _say(args, f"{args.out}: {sizes.after / 1e6:,.1f} MB of {sizes.before / 1e6:,.1f}, identity {identity}")
    if args.report:
        report = _report(args)
        result["report"] = report.as_json()
        for line in _lines(report):
            _say(args, line)
    if args.json:
        print(json.dumps(result))


def _report(args: argparse.Namespace) -> PrecisionReport:
    from twotower.eval.config import EvalConfig
    from twotower.eval.precision import report
    from twotower.model.checkpoint import Checkpoint
    from twotower.request import GenerationParams

    block = Checkpoint.open(args.checkpoint).limits.block_size
    config = EvalConfig(
        checkpoint=args.checkpoint,
        seed=args.seed,
        problems=args.problems,
        params=GenerationParams(max_tokens=args.max_tokens, block_size=block, steps=block, gamma=args.gamma),
        dtype=args.dtype,
        device=args.device,
        kernels=args.kernels,
        experts="bf16" if args.tower == "context" else args.experts,
        context_experts="bf16" if args.tower == "denoiser" else args.experts,
    )
    return report(config, args.batch)


def _lines(report: PrecisionReport) -> list[str]:
    lines = ["relative error        weights: mean, max      outputs: mean, max"]
    for each in report.layers:
        w, o = each.weights, each.outputs
        lines.append(f"{each.tower:>8} layer {each.layer:>3}:    {w.mean:.4f}  {w.max:.4f}         {o.mean:.4f}  {o.max:.4f}")
    for a in report.agreements:
        lines.append(
            f"{a.mode}: {a.equal_tokens:.1%} of tokens equal, {a.equal_generations:.1%} of {a.requests} generations; "
            f"solved {a.solved[0]:.1%} -> {a.solved[1]:.1%}, "
            f"tokens a forward {a.tokens_per_forward[0]:.2f} -> {a.tokens_per_forward[1]:.2f}"
        )
    return lines


def _say(args: argparse.Namespace, line: str) -> None:
    print(line, file=sys.stderr if args.json else sys.stdout, flush=True)
