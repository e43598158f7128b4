"""What computes can be chosen, by option or by environment, and a choice that cannot be is told."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.checkpoints import write_tiny_checkpoint

PROMPT = ("--local", "--prompt-ids", "5,6,7", "--max-tokens", "16", "--threads", "1")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


def _generate(checkpoint: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "twotower.cli.main", "generate", *PROMPT, "--checkpoint", str(checkpoint), *options]
    return subprocess.run(argv, env={**os.environ, **environment}, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("kernels", ["torch", "cpu", "auto"])
def test_the_environment_chooses(checkpoint: Path, kernels: str) -> None:
    result = _generate(checkpoint, TWOTOWER_KERNELS=kernels)
    assert result.returncode == 0, result.stderr


def test_what_cannot_be_chosen_is_told(checkpoint: Path) -> None:
    result = _generate(checkpoint, TWOTOWER_KERNELS="fast")
    assert result.returncode == 1
    assert result.stderr == "error: kernels: unknown backend 'fast': choose auto, torch, cpu or triton\n"


def test_the_option_goes_before_the_environment(checkpoint: Path) -> None:
    assert _generate(checkpoint, "--kernels", "torch", TWOTOWER_KERNELS="fast").returncode == 0
    assert "unknown backend 'fast'" in _generate(checkpoint, "--kernels", "fast", TWOTOWER_KERNELS="torch").stderr
