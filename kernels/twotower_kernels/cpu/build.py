"""Compiles the C++ beside it with the system's compiler, once for each machine and user, and loads it."""

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
from torch import Tensor

log = logging.getLogger(__name__)

SOURCES = Path(__file__).parent
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


def library_for(*tensors: Tensor | None) -> ctypes.CDLL | None:
    """The kernels, where they can compute with these: on a CPU, outside of compiled graphs, and without gradients."""
    if torch.compiler.is_compiling() or any(t is not None and t.device.type != "cpu" for t in tensors):
        return None
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return None
    return load()


def check(failed: int, what: str) -> None:
    """Raises MemoryError if a kernel says that it had none."""
    if failed:
        raise MemoryError(f"no memory for {what}")


def address(tensor: Tensor | None) -> int | None:
    """For a kernel; null for None."""
    return None if tensor is None else tensor.data_ptr()


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
    sources = sorted(SOURCES.glob("*.cpp"))
    texts = (path.read_bytes() for path in (*sources, *sorted(SOURCES.glob("*.h"))))
    key = hashlib.sha256(b"\0".join((*texts, version, *(word.encode() for word in words)))).hexdigest()[:16]
    library = cache / f"kernels-{key}.so"
    if not library.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            out = Path(scratch) / library.name
            command = [compiler, *FLAGS, *map(str, sources), *map(str, openmp), "-o", str(out)]
            subprocess.run(command, capture_output=True, check=True, timeout=BUILD_S)
            os.replace(out, library)
    return library


def _declared(library: ctypes.CDLL) -> ctypes.CDLL:
    pointer, count, number, single = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
    library.tt_linear.argtypes = [pointer, count, *(pointer,) * 4, *(count,) * 3, *(number,) * 3]
    library.tt_grouped_experts.argtypes = [pointer, count, *(pointer,) * 5, *(count,) * 5, number]
    library.tt_block_scan.argtypes = [
        *(pointer, count, count, *(pointer,) * 5, number, *(pointer,) * 4, *(single,) * 3),
        *(*(pointer,) * 6, *(count,) * 6, number, number),
    ]
    library.tt_time_steps.argtypes = [pointer, count, count, pointer, single, single, pointer, *(count,) * 4]
    library.tt_prefill_scan.argtypes = [
        *(pointer, count, *(pointer,) * 6, number, *(pointer,) * 4, *(single,) * 3),
        *(pointer, *(count,) * 5, number, number),
    ]
    library.tt_apply_factors.argtypes = [*(pointer,) * 7, *(count,) * 6, number]
    library.tt_modulated_norm.argtypes = [
        *(pointer, pointer, pointer, count, pointer, pointer, count, number),
        *(pointer, single, pointer, pointer, *(count,) * 3, number),
    ]
    library.tt_pin.argtypes = [pointer, number]
    library.tt_route.argtypes = [*(pointer,) * 5, *(count,) * 4, number, ctypes.c_double, number]
    library.tt_best.argtypes = [*(pointer,) * 5, count, count, number]
    library.tt_attend.argtypes = [
        *(pointer, count, count, pointer, count, pointer, count, pointer),
        *(*(count,) * 5, number, single, number),
    ]
    for function in (
        library.tt_linear,
        library.tt_time_steps,
        library.tt_apply_factors,
        library.tt_modulated_norm,
        library.tt_best,
    ):
        function.restype = None
    for function in (
        library.tt_grouped_experts,
        library.tt_block_scan,
        library.tt_prefill_scan,
        library.tt_route,
        library.tt_attend,
    ):
        function.restype = number  # 0, or 1 if memory ran out
    library.tt_pin.restype = number
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
