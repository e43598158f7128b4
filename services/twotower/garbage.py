"""What a service does with memory that it no longer uses: Python's garbage collector, and the C library's heap."""

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


M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
LARGE_BYTES = 1 << 20
KEPT = ((M_MMAP_THRESHOLD, 32 << 20), (M_TRIM_THRESHOLD, 1 << 30), (M_TOP_PAD, 64 << 20))
"""32 MB is the largest threshold that glibc takes."""


def return_large_blocks() -> None:
    """Make this process return blocks of `LARGE_BYTES` and more to the system when they are freed, if its C library is glibc.

    By default glibc keeps some of this memory once such blocks have been freed; how much depends on their order.
    """
    _set_heap((M_MMAP_THRESHOLD, LARGE_BYTES))


def keep_freed_blocks() -> None:
    """Make this process keep the memory that it frees, if its C library is glibc.

    A tower frees after each forward what the next one needs. Outside of the main thread glibc would return it to the
    system, and the next forward would fault it in again, page by page.
    """
    _set_heap(*KEPT)


def _set_heap(*options: tuple[int, int]) -> None:
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in options:
            mallopt(option, value)
