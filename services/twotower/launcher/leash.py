"""Becomes another program that is killed when its parent dies: ``python leash.py PARENT_PID PROGRAM ARGS...``

A script of its own, run between fork and exec, because the parent may not run Python there: its other threads
(gRPC's, torch's) may hold locks at that moment, which the child would wait for in vain.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main() -> None:
    """Bind this process to its parent, then become the program."""
    parent, program = int(sys.argv[1]), sys.argv[2:]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before it could be told
            sys.exit(1)
    try:
        os.execv(program[0], program)
    except OSError as error:
        sys.exit(f"error: {program[0]} cannot be started: {error.strerror}")


if __name__ == "__main__":
    main()
