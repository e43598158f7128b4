"""Python's garbage collector in a service."""

from __future__ import annotations

import contextlib
import ctypes
import gc


def freeze_loaded_objects() -> None:
    """Exempt all present objects from collection: modules, weights and the service's own parts live as long as the process.

    A full collection would visit all of them (half a million with torch), and stop the process for 0.2 s.
    """
    gc.collect()
    gc.freeze()


M_MMAP_THRESHOLD = -3
LARGE_BYTES = 1 << 20


def return_large_blocks() -> None:
    """Make this process return blocks of `LARGE_BYTES` and more to the system when they are freed, if its C library is glibc.

    By default glibc keeps some of this memory once such blocks have been freed; how much depends on their order.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, LARGE_BYTES)
