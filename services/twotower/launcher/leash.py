"""Becomes another program that is sent SIGNAL when its parent dies: ``python leash.py PARENT_PID SIGNAL PROGRAM ARGS...``

A script of its own, run between fork and exec, because the parent may not run Python there: its other threads
(gRPC's, torch's) may hold locks at that moment, which the child would wait for in vain.
"""

from __future__ import annotations

import ctypes
import os
import sys

PR_SET_PDEATHSIG = 1


def main() -> None:
    """Bind this process to its parent, then become the program."""
    parent, number, program = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)
        if os.getppid() != parent:  # it died before it could be told
            sys.exit(1)
    try:
        os.execv(program[0], program)
    except OSError as error:
        sys.exit(f"error: {program[0]} cannot be started: {error.strerror}")


if __name__ == "__main__":
    main()
