"""`twotower train all|corpus|tokenizer|context|denoiser`: make a checkpoint, on the built-in tasks or on your own texts."""

from __future__ import annotations

import argparse
import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from twotower.train.run import TrainConfig

Commands = argparse._SubParsersAction


def add_parser(commands: Commands[argparse.ArgumentParser]) -> None:
    """Register the command and its parts."""
    train = commands.add_parser("train", help="train a checkpoint's tokenizer, context tower or denoiser", allow_abbrev=False)
    parts = train.add_subparsers(title="parts", metavar="PART", required=True)

    whole = parts.add_parser(
        "all", help="make a checkpoint of both towers from nothing, on the built-in tasks", allow_abbrev=False
    )
    whole.add_argument(
        "--context-share", type=_share, default=0.25, help="share of the time that goes to the context tower (default 0.25)"
    )
    whole.add_argument("--own-tokens", type=_share, default=0.25, help=argparse.SUPPRESS)
    _add_training(whole, minutes=12.0, ema=0.998, tasks="suite")
    whole.set_defaults(run=_all)

    corpus = parts.add_parser("corpus", help="write built-in tasks as JSONL", allow_abbrev=False)
    corpus.add_argument("--out", type=Path, required=True, help="file to write")
    corpus.add_argument("--count", type=_positive, default=1000)
    corpus.add_argument("--split", choices=("train", "eval"), default="train", help="no question is in both")
    corpus.add_argument("--seed", type=int, default=0)
    _add_tasks(corpus)
    corpus.set_defaults(run=_corpus)

    tokenizer = parts.add_parser("tokenizer", help="train a byte-level BPE tokenizer", allow_abbrev=False)
    tokenizer.add_argument("--out", type=Path, required=True, help="tokenizer.json to write")
    tokenizer.add_argument(
        "--vocab-size",
        type=_positive,
        help="at most; fewer where every word is whole (default 1024; for the suite, what its words need)",
    )
    _add_corpus(tokenizer)
    _add_tasks(tokenizer)
    tokenizer.set_defaults(run=_tokenizer)

    context = parts.add_parser("context", help="train a context tower from nothing", allow_abbrev=False)
    context.add_argument("--tokenizer", type=Path, required=True, help="tokenizer.json (see `twotower train tokenizer`)")
    context.add_argument("--prompt-weight", type=_share, default=0.1, help="weight of prompt tokens in the loss (default 0.1)")
    _add_training(context, minutes=17.0, ema=0.99)
    context.set_defaults(run=_context)

    denoiser = parts.add_parser("denoiser", help="train a denoiser against a frozen context tower", allow_abbrev=False)
    denoiser.add_argument("--context", type=Path, required=True, metavar="CKPT", help="checkpoint whose context tower to use")
    denoiser.add_argument(
        "--own-order",
        type=_share,
        default=0.3,
        help="share of batches masked as the model's own refinement would (default 0.3)",
    )
    denoiser.add_argument(
        "--all-masked", type=_share, default=0.3, help="share of blocks masked whole, as refinement starts (default 0.3)"
    )
    denoiser.add_argument(
        "--own-tokens",
        type=_share,
        default=0.0,
        help="share of those in which the known tokens are the model's own as well (default 0)",
    )
    denoiser.add_argument(
        "--blocks", type=_positive, nargs="+", default=None, metavar="L", help="block sizes to learn (default: its own)"
    )
    denoiser.add_argument(
        "--head-scale", type=_share, default=1.0, help="calibration: below 1 the denoiser is less sure (default 1)"
    )
    _add_training(denoiser, minutes=48.0, ema=0.998)
    denoiser.set_defaults(run=_denoiser)


def _add_corpus(parser: argparse.ArgumentParser) -> None:
    forms = 'JSONL with "prompt" and "completion" a line, a .txt file, or a directory of .txt files'
    parser.add_argument("--corpus", type=Path, help=f"{forms} (default: built-in tasks)")
    parser.add_argument("--seed", type=int, default=0)


def _add_tasks(parser: argparse.ArgumentParser, default: str = "stories") -> None:
    parser.add_argument(
        "--tasks",
        choices=("stories", "suite"),
        default=default,
        help=f"built-in ones: word problems, as the shipped checkpoint's; or math, code and knowledge (default {default})",
    )


def _add_training(parser: argparse.ArgumentParser, *, minutes: float, ema: float, tasks: str = "stories") -> None:
    parser.add_argument("--out", type=Path, required=True, help="checkpoint directory to write")
    parser.add_argument("--run-dir", type=Path, required=True, help="state and metrics; a run found here is resumed")
    parser.add_argument("--steps", type=_positive, help="end after this number of steps (default: by time alone)")
    parser.add_argument(
        "--minutes", type=float, help=f"end after this time of training (default {minutes:g}, or none with --steps)"
    )
    parser.add_argument("--rows", type=_positive, default=16, help="texts in a batch (default 16)")
    parser.add_argument("--threads", type=_positive, default=2, help="CPU threads (default 2)")
    parser.add_argument("--device", default="auto", help="auto (CUDA where there is one), cpu, cuda, cuda:N")
    parser.add_argument("--init", type=Path, metavar="CKPT", help="start from this checkpoint's weights")
    parser.add_argument("--muon-lr", type=float, default=0.02, help="peak rate for the layers' matrices (default 0.02)")
    parser.add_argument("--adam-lr", type=float, default=3e-3, help="peak rate for everything else (default 0.003)")
    parser.add_argument("--drill-share", type=_share, help="drills among the built-in tasks (default 0.3; suite: 0.1)")
    parser.add_argument("--max-number", type=_positive, help="greatest in the built-in problems (default 20; suite: 100)")
    parser.add_argument("--ema", type=float, default=ema, help=f"decay of the averaged weights a step (default {ema:g})")
    parser.add_argument("--fp32", action="store_true", help="no bf16 anywhere")
    parser.add_argument("--workers", type=int, default=0, help="processes that make built-in tasks ahead (default 0: none)")
    parser.add_argument("--pool-size", type=_positive, default=2048, help="tasks that are sorted into batches (default 2048)")
    parser.add_argument("--save-minutes", type=float, default=3.0, help="save the state this often (default 3)")
    parser.add_argument("--snapshots", action="store_true", help="write the checkpoint as often as the state")
    parser.set_defaults(default_minutes=minutes)
    _add_tasks(parser, tasks)
    if tasks == "stories":
        _add_corpus(parser)
    else:
        parser.add_argument("--seed", type=int, default=0)
        parser.set_defaults(corpus=None)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
    return value


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be in [0, 1], not {value:g}")
    return value


def _corpus(args: argparse.Namespace) -> None:
    from twotower.train.run import write_corpus

    write_corpus(args.out, args.split, args.count, args.seed, args.tasks)


def _tokenizer(args: argparse.Namespace) -> None:
    from twotower.train.run import write_tokenizer

    write_tokenizer(args.out, args.corpus, args.vocab_size, args.seed, args.tasks)


def _context(args: argparse.Namespace) -> None:
    from twotower.train.run import train_context

    train_context(_config(args), args.tokenizer, args.prompt_weight)


def _all(args: argparse.Namespace) -> None:
    from twotower.train.denoiser import Masking
    from twotower.train.pipeline import PipelineConfig, train_all
    from twotower.train.run import BLOCKS

    config = _config(args)
    if args.tasks == "suite":
        config = dataclasses.replace(config, blocks=BLOCKS)
    train_all(PipelineConfig(config, args.context_share, Masking(own_tokens=args.own_tokens)))


def _denoiser(args: argparse.Namespace) -> None:
    from twotower.train.denoiser import Masking
    from twotower.train.run import train_denoiser

    masking = Masking(args.all_masked, args.own_order, args.own_tokens)
    config = _config(args)
    if args.blocks:
        config = dataclasses.replace(config, blocks=dict.fromkeys(args.blocks, 1 / len(args.blocks)))
    train_denoiser(config, args.context, masking=masking, head_scale=args.head_scale)


def _config(args: argparse.Namespace) -> TrainConfig:
    from twotower.train.loop import LoopConfig
    from twotower.train.optim import OptimConfig
    from twotower.train.run import TrainConfig

    minutes = args.minutes
    if minutes is None:
        minutes = math.inf if args.steps is not None else args.default_minutes
    loop = LoopConfig(
        steps=args.steps or 10**9,
        minutes=minutes,
        ema=args.ema,
        save_minutes=args.save_minutes,
        bf16=not args.fp32,
        seed=args.seed,
        optim=OptimConfig(muon_lr=args.muon_lr, adam_lr=args.adam_lr),
    )
    return TrainConfig(
        args.out,
        args.run_dir,
        args.corpus,
        args.rows,
        args.threads,
        args.device,
        loop,
        args.init,
        args.tasks,
        args.drill_share,
        args.max_number,
        args.workers,
        args.pool_size,
        args.snapshots,
    )
