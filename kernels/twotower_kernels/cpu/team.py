"""Where the threads of a CPU's operations run."""

from __future__ import annotations

import ctypes
import os

from twotower_kernels.cpu.build import load


def pin(threads: int) -> bool:
    """Keep this thread, and those that help it in operations, to one CPU each; False where that cannot be done.

    Left to itself, Linux may wake a helper on the CPU of the thread that waits for it, and leave it there: half the speed.
    """
    library, cpus = load(), sorted(os.sched_getaffinity(0))
    if library is None or threads > len(cpus):
        return False
    return library.tt_pin((ctypes.c_int * threads)(*cpus[:threads]), threads) == 0
