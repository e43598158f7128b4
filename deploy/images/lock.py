"""Prints the versions, as installed here, of everything that the package needs: what deploy/images/constraints.txt holds.

python deploy/images/lock.py > deploy/images/constraints.txt
"""

from __future__ import annotations

import importlib.metadata
import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

PROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"


def closure() -> dict[str, str]:
    """Name -> version of all that the project's dependencies bring, without extras.

    CUDA's packages come with torch's own pins.
    """
    waiting = [Requirement(line) for line in tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]["dependencies"]]
    found: dict[str, str] = {}
    while waiting:
        needed = waiting.pop()
        name = re.sub(r"[-_.]+", "-", needed.name).lower()
        if name in found or (needed.marker is not None and not needed.marker.evaluate({"extra": ""})):
            continue
        try:
            distribution = importlib.metadata.distribution(needed.name)
        except importlib.metadata.PackageNotFoundError:
            continue  # of another platform
        found[name] = distribution.version.partition("+")[0]
        waiting += [Requirement(line) for line in distribution.requires or ()]
    return found


if __name__ == "__main__":
    print("# Versions of what the images install: those with which the tests ran. Written by deploy/images/lock.py.")
    for name, version in sorted(closure().items()):
        print(f"{name}=={version}")
