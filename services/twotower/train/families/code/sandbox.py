"""Runs a written function in a separate process, with limits on time, memory and files, and few names to call."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass

CPU_SECONDS = 2
WALL_SECONDS = 10
"""The limit of elapsed time, above the CPU time's: a machine may be busy, and a program may sleep."""

MEMORY_BYTES = 256 << 20
MAX_SOURCE = 20_000


@dataclass(frozen=True, slots=True)
class Call:
    """An assertion, as Python literals."""

    arguments: str
    """The arguments as a list."""
    expected: str
    """The required repr() of the result, so that 1 is not True, and 1.0 not 1."""


def run_calls(source: str, name: str, calls: Sequence[Call]) -> bool:
    """Whether the function `name` of `source` returns the expected results, call after call.

    Returns False as well if the source does not compile, raises, exceeds a limit, or tries to leave the sandbox: it may not
    import, nor use a name with two leading underscores.
    """
    if len(source) > MAX_SOURCE:
        return False
    job = json.dumps({"source": source, "name": name, "calls": [asdict(call) for call in calls]})
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _RUNNER, str(CPU_SECONDS), str(MEMORY_BYTES)],
            input=job.encode(),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={},
            cwd="/",
            timeout=WALL_SECONDS,
            start_new_session=True,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0 and done.stdout.endswith(b"\npassed\n")


_RUNNER = r"""
import ast, builtins, json, resource, sys
cpu, memory = int(sys.argv[1]), int(sys.argv[2])
job = json.load(sys.stdin)
resource.setrlimit(resource.RLIMIT_CPU, (cpu, cpu))
resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
tree = ast.parse(job["source"])
for node in ast.walk(tree):
    if isinstance(node, (ast.Import, ast.ImportFrom, ast.Global, ast.Nonlocal)):
        sys.exit(1)
    for field in ("id", "attr", "name", "arg"):
        if str(getattr(node, field, "")).startswith("__"):
            sys.exit(1)
    if isinstance(node, ast.Attribute) and node.attr in ("format", "format_map", "mro") or (
        isinstance(node, ast.Attribute) and node.attr.startswith(("gi_", "f_", "tb_", "cr_", "ag_", "co_"))):
        sys.exit(1)
ALLOWED = ("abs all any bool chr dict divmod enumerate filter float frozenset int isinstance len list map max min ord pow "
           "range repr reversed round set sorted str sum tuple zip ValueError TypeError IndexError KeyError Exception").split()
scope = {"__builtins__": {name: getattr(builtins, name) for name in ALLOWED}}
code = compile(tree, "written", "exec")
report = sys.stdout.write
exec(code, scope)
function = scope[job["name"]]
for call in job["calls"]:
    if repr(function(*ast.literal_eval(call["arguments"]))) != call["expected"]:
        sys.exit(1)
report("\npassed\n")
"""
