from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from twotower_kernels.cpu.build import load
from twotower_kernels.cpu.team import pin


@pytest.mark.skipif(load() is None, reason="no C++ kernels on this machine")
def test_a_thread_is_kept_to_one_cpu_and_no_other_thread() -> None:
    before = os.sched_getaffinity(0)

    def pinned() -> tuple[bool, set[int]]:
        done = pin(len(before))
        return done, os.sched_getaffinity(0)

    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(pinned).result() == (True, {min(before)})
    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(pin, 1).result()
    assert os.sched_getaffinity(0) == before


def test_more_threads_than_cpus_are_left_alone() -> None:
    before = os.sched_getaffinity(0)
    assert not pin(len(before) + 1)
    assert os.sched_getaffinity(0) == before
