"""Python's garbage collector in a service."""

from __future__ import annotations

import contextlib
import ctypes
import gc


def spare_what_is_loaded() -> None:
    """Never look again at what lives as long as the process: modules, weights, the service's own parts.

    A full collection goes through all of it (half a million objects with torch), and holds everything up for 0.2 s.
    """
    gc.collect()
    gc.freeze()


M_MMAP_THRESHOLD = -3
LARGE = 1 << 20
"""Bytes."""


def give_back_large_blocks() -> None:
    """Let memory of large blocks go back to the system when it is freed, in this process, where the C library is glibc.

    By itself glibc keeps it once such blocks have come and gone, in an amount that depends on their order.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, LARGE)
