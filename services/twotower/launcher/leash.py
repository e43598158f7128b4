"""Replaces itself by a program that gets SIGNAL when its parent dies: ``python leash.py PARENT_PID SIGNAL PROGRAM ARGS...``

This is a separate script, started in place of the program, because the parent cannot safely run Python between fork and
exec: its other threads (gRPC's, torch's) may hold locks at that moment, for which the child would wait for ever.
"""

from __future__ import annotations

import ctypes
import os
import sys

PR_SET_PDEATHSIG = 1


def main() -> None:
    """Bind this process to its parent, then execute the program."""
    parent, number, program = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)
        if os.getppid() != parent:  # the parent died before the signal was set
            sys.exit(1)
    try:
        os.execv(program[0], program)
    except OSError as error:
        sys.exit(f"error: {program[0]} cannot be started: {error.strerror}")


if __name__ == "__main__":
    main()
