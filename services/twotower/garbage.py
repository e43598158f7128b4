"""Python's garbage collector in a service."""

from __future__ import annotations

import gc


def spare_what_is_loaded() -> None:
    """Never look again at what lives as long as the process: modules, weights, the service's own parts.

    A full collection goes through all of it (half a million objects with torch), and holds everything up for 0.2 s.
    """
    gc.collect()
    gc.freeze()
