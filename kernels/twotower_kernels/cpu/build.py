"""Compiles `kernels.cpp` with the system's compiler, once for each machine and user, and loads it."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

log = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("kernels.cpp")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-fPIC", "-shared", "-Wl,--as-needed")
NEEDED = frozenset({"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16"})
"""What the CPU must be able to do."""
BUILD_S = 120.0

MIN_OUTPUTS = 16
"""A matrix must have at least so many rows: the kernels compute so many outputs at a time."""


@functools.cache
def load() -> ctypes.CDLL | None:
    """The compiled kernels; None where the CPU or a compiler for them is missing, which is logged once."""
    missing = NEEDED - _cpu_flags()
    if missing:
        log.debug("CPU kernels are not used: this CPU lacks %s", ", ".join(sorted(missing)))
        return None
    try:
        return _declared(ctypes.CDLL(str(build())))
    except (OSError, subprocess.SubprocessError) as error:
        log.warning("CPU kernels are not used, which costs speed: %s", _explain(error))
        return None


def build(cache: Path | None = None) -> Path:
    """The library, compiled unless `cache` holds it. Raises OSError, subprocess.SubprocessError.

    Several processes may build at once: each writes a file of its own, and the last one's stays.
    """
    compiler = next((path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None)
    if compiler is None:
        raise FileNotFoundError("no C++ compiler (c++, g++ or clang++) was found")
    cache = cache or Path.home() / ".cache" / "twotower"
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=BUILD_S).stdout
    # torch's own OpenMP, so that there is one in the process: the threads of a second would wait for the first's CPUs.
    openmp = sorted(Path(torch.__file__).with_name("lib").glob("libgomp*.so*"))
    words = (*FLAGS, *map(str, openmp), *sorted(_cpu_flags()))
    key = hashlib.sha256(b"\0".join((SOURCE.read_bytes(), version, *(word.encode() for word in words)))).hexdigest()[:16]
    library = cache / f"kernels-{key}.so"
    if not library.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            out = Path(scratch) / library.name
            command = [compiler, *FLAGS, str(SOURCE), *map(str, openmp), "-o", str(out)]
            subprocess.run(command, capture_output=True, check=True, timeout=BUILD_S)
            os.replace(out, library)
    return library


def _declared(library: ctypes.CDLL) -> ctypes.CDLL:
    pointer, count, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    library.tt_linear.argtypes = [pointer, count, pointer, pointer, pointer, count, count, count, number]
    library.tt_linear.restype = None
    library.tt_grouped_experts.argtypes = [pointer, count, *(pointer,) * 5, *(count,) * 5, number]
    library.tt_grouped_experts.restype = number
    return library


def _cpu_flags() -> frozenset[str]:
    """What Linux says the CPU can do; empty elsewhere."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return frozenset()
    line = next((line for line in text.splitlines() if line.startswith("flags")), "")
    return frozenset(line.partition(":")[2].split())


def _explain(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        lines = (error.stderr or b"").decode(errors="replace").strip().splitlines()
        return f"the compiler failed: {lines[0] if lines else error}"
    return str(error)
