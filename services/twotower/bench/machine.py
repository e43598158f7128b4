"""Where a benchmark ran: the machine, the software, the commit."""

from __future__ import annotations

import os
import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch

PACKAGE = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, slots=True)
class Machine:
    """The hardware and software that decide the speed. Records of equal machines are comparable."""

    cpu: str
    """The model name that the system reports."""
    cores: int
    """The number of CPUs that this process may use."""
    gpu: str | None
    """The name of torch's current CUDA device."""
    python: str
    torch: str

    @property
    def label(self) -> str:
        """The hardware without the versions, for legends."""
        return f"{self.gpu or self.cpu}, {self.cores} cores"


def this_machine() -> Machine:
    """The machine that this process runs on."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return Machine(_cpu(), len(os.sched_getaffinity(0)), gpu, platform.python_version(), torch.__version__)


def this_commit() -> str | None:
    """Short hash of the commit of this package's source, with ``+`` if files differ from it; None outside a repository."""
    commit = _git("rev-parse", "--short=10", "HEAD")
    if commit is None:
        return None
    return f"{commit}+" if _git("status", "--porcelain", "--untracked-files=no", "--", ".") else commit


def _git(*words: str) -> str | None:
    try:
        done = subprocess.run(["git", *words], cwd=PACKAGE, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
