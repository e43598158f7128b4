"""`twotower bench kernels` and `twotower bench towers`: the speed of the model's computations on a device."""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import TYPE_CHECKING, Any

from twotower.cli.bench_output import Parts, say
from twotower.cli.options import check_at_least_one
from twotower.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from twotower.bench.kernels import KernelRow
    from twotower.bench.roofline import Roofline
    from twotower.bench.towers import TowerRow
    from twotower.model.config import ModelConfig

BATCHES = (1, 8, 32, 64, 128)
CONTEXTS = (128, 2048, 32768)


def add_parts(parts: Parts[argparse.ArgumentParser]) -> None:
    """Register both commands."""
    kernels = parts.add_parser("kernels", help="each kernel beside its plain form and the device's limits", allow_abbrev=False)
    _add_size(kernels)
    kernels.add_argument("--only", nargs="+", metavar="NAME", help="these kernels (default: all)")
    kernels.set_defaults(run=run_kernels)

    towers = parts.add_parser("towers", help="a denoiser step, a commit, an AR step, and what follows", allow_abbrev=False)
    _add_size(towers)
    towers.add_argument("--layers", metavar="PATTERN", help="these layers, e.g. ME* (default: all of the size)")
    towers.add_argument("--experts", default="bf16", choices=("bf16", "fp8", "fp4"), help="precision of the routed experts")
    towers.add_argument("--no-plain", action="store_true", help="leave the loop over experts out, which is slow")
    towers.add_argument(
        "--roofline", metavar="GB_S,TFLOPS", help="measure nothing: steps as fast as such a device allows, e.g. 4800,989"
    )
    towers.set_defaults(run=run_towers)


def _add_size(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", choices=("small", "middle", "real"), default="real", help="of the model (default real)")
    parser.add_argument("--batch", type=int, nargs="+", default=list(BATCHES), metavar="B", help="default 1 8 32 64 128")
    parser.add_argument("--context", type=int, nargs="+", default=list(CONTEXTS), metavar="N", help="default 128 2048 32768")
    parser.add_argument("--device", default="auto", help="auto (CUDA where there is one), cpu, cuda, cuda:N")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's)")
    parser.add_argument("--seconds", type=float, default=0.3, metavar="S", help="for each measurement, about (default 0.3)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run_kernels(args: argparse.Namespace) -> None:
    """Measure and print."""
    from twotower.bench.kernels import KERNELS, KernelBench

    kernels = tuple(args.only or KERNELS)
    if unknown := set(kernels) - set(KERNELS):
        raise ConfigError(f"only: no kernel is called {min(unknown)}; there are {', '.join(KERNELS)}")
    device, roofline = _device(args)
    say(args, "| kernel | batch | context | ms | MB | GFLOP | of the roofline | plain, ms | plain / kernel | experts |")
    say(args, "|" + "---|" * 10)
    rows = []
    for row in KernelBench(_config(args), device, roofline, args.seconds).rows(kernels, args.batch, args.context):
        rows.append(row.as_json())
        say(args, _kernel_line(row))
    if args.json:
        print(json.dumps({**_place(args, device, roofline), "rows": rows}))


def run_towers(args: argparse.Namespace) -> None:
    """Measure or compute, and print."""
    from twotower.bench.roofline import Roofline
    from twotower.bench.speedup import speedup_table
    from twotower.bench.towers import TowerBench, computed, times

    config = _config(args)
    say(args, "| step | batch | context | ms | GB | TFLOP | at least, ms | of the roofline | plain, ms | experts a layer |")
    say(args, "|" + "---|" * 10)
    rows: list[TowerRow] = []
    if args.roofline is not None:
        _check(args)
        roofline = Roofline.parse(args.roofline)
        rows = computed(config, args.experts, roofline, args.batch, args.context)
        place = {"computed": True, "roofline": dataclasses.asdict(roofline)}
        for row in rows:
            say(args, _tower_line(row))
    else:
        device, roofline = _device(args)
        bench = TowerBench(config, device, args.experts, roofline, args.seconds, not args.no_plain)
        for row in bench.rows(args.batch, args.context):
            rows.append(row)
            say(args, _tower_line(row))
        place = {**_place(args, device, roofline), "shared_weights": bench.shared}
        if bench.shared:
            say(args, "\nLayers of one kind shared their weights: memory does not hold all of them.")
    table = times(rows, config.block_size)
    say(args, "\nOne context and one denoiser, each on a device of its own, against AR on one:\n")
    for line in speedup_table(table):
        say(args, line)
    if args.json:
        figures = {"experts": args.experts, "layers": config.hybrid_override_pattern, **place}
        figures["rows"] = [row.as_json() for row in rows]
        figures["needed_tokens_per_forward"] = [
            {"batch": t.batch, "context": t.context, "tokens_per_forward": t.needed()} for t in table
        ]
        print(json.dumps(figures))


def _config(args: argparse.Namespace) -> ModelConfig:
    from twotower.bench.checkpoint import MIDDLE
    from twotower.bench.sizes import REAL
    from twotower.model.config import ModelConfig
    from twotower.train.start import WORD_PROBLEMS

    config = ModelConfig.from_dict({"small": WORD_PROBLEMS, "middle": MIDDLE, "real": REAL}[args.size])
    layers = getattr(args, "layers", None)
    if layers is None:
        return config
    if not layers or set(layers) - set(config.hybrid_override_pattern):
        raise ConfigError(f"layers: must be made of {' '.join(sorted(set(config.hybrid_override_pattern)))}, not {layers!r}")
    return dataclasses.replace(config, hybrid_override_pattern=layers)


def _check(args: argparse.Namespace) -> None:
    check_at_least_one(args, "batch", "context", "threads")
    if not 0 < args.seconds < float("inf"):
        raise ConfigError(f"seconds: must be positive, not {args.seconds}")


def _device(args: argparse.Namespace) -> tuple[torch.device, Roofline]:
    """The device, and its measured limits, which this prints."""
    import torch

    from twotower.bench.roofline import measure
    from twotower.model.weights import resolve_device

    _check(args)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    device = resolve_device(args.device)
    roofline = measure(device, args.seconds)
    say(args, f"{_name(device)}: {roofline}, measured\n")
    return device, roofline


def _name(device: torch.device) -> str:
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def _place(args: argparse.Namespace, device: torch.device, roofline: Roofline) -> dict[str, Any]:
    return {"computed": False, "size": args.size, "device": _name(device), "roofline": dataclasses.asdict(roofline)}


def _kernel_line(row: KernelRow) -> str:
    context = "" if row.context is None else f"{row.context:,}"
    drawn = "" if row.experts is None else f"{row.experts[0]:.1f} expected, {row.experts[1]} drawn"
    took, gain = ("", "") if row.kernel_s is None else (f"{1e3 * row.kernel_s:,.3f}", f"{row.plain_s / row.kernel_s:.2f}x")
    return (
        f"| {row.kernel} | {row.batch} | {context} | {took} | {row.cost.bytes / 1e6:,.2f} | {row.cost.flops / 1e9:,.3f} "
        f"| {row.share:.1%} | {1e3 * row.plain_s:,.3f} | {gain} | {drawn} |"
    )


def _tower_line(row: TowerRow) -> str:
    took, share = ("", "") if row.seconds is None else (f"{1e3 * row.seconds:,.3f}", f"{row.share:.1%}")
    plain = "" if row.plain_s is None else f"{1e3 * row.plain_s:,.3f}"
    drawn = "" if row.experts is None else f"{row.experts[0]:.1f} expected, {row.experts[1]:.1f} drawn"
    return (
        f"| {row.step} | {row.batch} | {row.context:,} | {took} | {row.cost.bytes / 1e9:,.3f} | {row.cost.flops / 1e12:,.3f} "
        f"| {1e3 * row.least_s:,.3f} | {share} | {plain} | {drawn} |"
    )
