"""`twotower`: the commands, and the one place where errors become a line on stderr and an exit status."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence

from twotower import __version__
from twotower.cli import bench, conformance, demo, drain, evaluate, generate, quantize, services, trace, train, up
from twotower.errors import TwoTowerError
from twotower.logs import BoundedLog
from twotower.settings.command_line import OneLineParser
from twotower.settings.sources import DEBUG_VARIABLE
from twotower.settings.values import YES

Run = Callable[[argparse.Namespace], int | None]

EXIT_ERROR = 1
EXIT_INTERRUPTED = 130


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands. Help imports no heavy module."""
    parser = OneLineParser(
        prog="twotower", description="Serving system for two-tower diffusion language models.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"twotower {__version__}")
    parser.add_argument("--debug", action="store_true", help="log in detail, and show tracebacks")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for module in (up, generate, conformance, demo, evaluate, bench, trace, quantize, drain, services, train):
        module.add_parser(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit status."""
    try:
        args = build_parser().parse_args(argv)
    except TwoTowerError as error:  # from a value in the environment
        print(f"error: {error}", file=sys.stderr)
        return EXIT_ERROR
    args.debug = args.debug or os.environ.get(DEBUG_VARIABLE, "").lower() in YES
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # gRPC reads it on first use; a peer that stops is not worth a line
    handler = logging.StreamHandler(sys.stderr)
    if not args.debug:
        handler.addFilter(BoundedLog())
    logging.basicConfig(
        level=logging.DEBUG if args.debug else logging.INFO,
        handlers=[handler],
        format="%(levelname)s %(name)s: %(message)s",
    )
    for noisy in ("asyncio", "httpx", "matplotlib"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    run: Run = args.run
    try:
        status = run(args) or 0
        sys.stdout.flush()
        return status
    except TwoTowerError as error:
        if args.debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return EXIT_ERROR
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has gone, as in `| head`, so nothing more can be written, not even at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_ERROR
    except Exception as error:
        if args.debug:
            raise
        print(f"error: internal error: {error!r} (`twotower --debug ...` shows where)", file=sys.stderr)
        return EXIT_ERROR


if __name__ == "__main__":
    sys.exit(main())
