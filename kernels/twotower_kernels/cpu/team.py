"""Which CPUs the threads of torch's operations run on."""

from __future__ import annotations

import ctypes
import os

from twotower_kernels.cpu.build import load


def pin(threads: int) -> bool:
    """Pin this thread and its OpenMP helpers to one CPU each; returns False where that is not possible.

    Without this, Linux may wake a helper on the CPU of the thread that waits for it and leave it there, at half the speed.
    """
    library, cpus = load(), sorted(os.sched_getaffinity(0))
    if library is None or threads > len(cpus):
        return False
    return library.tt_pin((ctypes.c_int * threads)(*cpus[:threads]), threads) == 0
