"""What is freed stays with a tower's process: a forward after the first ones takes little from the system."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys, threading, torch
from twotower.garbage import keep_freed_blocks

if sys.argv[1] == "keep":
    keep_freed_blocks()

def forward():
    for size in (3 << 20, 200 << 10, 9 << 20, 700 << 10):
        blocks = [torch.ones(size, dtype=torch.uint8) for _ in range(4)]

def work():
    forward()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        forward()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

thread = threading.Thread(target=work)
thread.start()
thread.join()
"""


def _faults(how: str) -> int:
    """Page faults of ten forwards, outside of the main thread."""
    done = subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be asked to")
def test_what_a_forward_frees_stays() -> None:
    assert _faults("keep") < _faults("return") / 3
