"""`python -m tests.faults [SCENARIO ...] [--minutes M] [-- OPTIONS OF UP]`: storms as long as one likes."""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from contextlib import suppress
from pathlib import Path

from tests.faults.scenarios import precision, scenarios
from tests.faults.storm import Report, Scenario, weather
from tests.support.processes import up
from twotower.cli.options import DEFAULT_CHECKPOINT


def main() -> int:
    """Run the scenarios one after another; 1 if any of them shows a fault."""
    known = scenarios()
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="SCENARIO", help=f"default: all of {', '.join(known)}")
    parser.add_argument("--minutes", type=float, default=0.5, help="of storm in each scenario (default 0.5)")
    parser.add_argument("--log", type=Path, metavar="DIR", help="where the stacks' logs are kept (default: nowhere)")
    own, options = _split(sys.argv[1:])
    args = parser.parse_args(own)
    if unknown := set(args.names) - set(known):
        parser.error(f"no such scenario: {', '.join(sorted(unknown))}")
    reports = [_run(known[name], args.minutes * 60, options, args.log) for name in args.names or known]
    print("\n".join(report.lines()[0] for report in reports))
    return int(any(report.problems for report in reports))


def _run(scenario: Scenario, seconds: float, options: list[str], log: Path | None) -> Report:
    started = time.monotonic()

    def say(line: str) -> None:
        print(f"[{time.monotonic() - started:6.1f}] {line}", file=sys.stderr, flush=True)

    with up(DEFAULT_CHECKPOINT, *scenario.options, *precision(), *options) as stack:
        try:
            report = asyncio.run(weather(scenario, stack, seconds, say))
            if report.alive:
                with suppress(TimeoutError):
                    report.exit_status = stack.terminate()
        finally:
            if log is not None:
                log.mkdir(parents=True, exist_ok=True)
                (log / f"{scenario.name}.log").write_text("\n".join(stack.log) + "\n")
    print("\n".join(report.lines()) + "\n", flush=True)
    return report


def _split(words: list[str]) -> tuple[list[str], list[str]]:
    """Ours, and what follows ``--``."""
    if "--" not in words:
        return words, []
    at = words.index("--")
    return words[:at], words[at + 1 :]


if __name__ == "__main__":
    sys.exit(main())
