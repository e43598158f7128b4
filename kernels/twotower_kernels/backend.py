"""Which form of the computations runs: Triton kernels on CUDA devices, C++ on CPUs, plain torch anywhere."""

from __future__ import annotations

import importlib
import os
from typing import Literal

import torch

from twotower_kernels.cpu.kernels import CpuKernels
from twotower_kernels.kernels import TORCH, Kernels

Backend = Literal["torch", "cpu", "triton"]


class BackendUnavailable(ValueError):
    """The chosen backend cannot run here; the message gives the reason and the remedy."""


def resolve(name: str, device: torch.device) -> Backend:
    """Returns the backend for tensors on `device`; "auto" is Triton on a CUDA device where it is installed, "cpu" on a CPU.

    Triton is imported only where it may be used, so that it stays an optional dependency.
    """
    if name not in ("auto", "torch", "cpu", "triton"):
        raise BackendUnavailable(f"unknown backend {name!r}: choose auto, torch, cpu or triton")
    if name == "torch" or (name == "auto" and device.type not in ("cpu", "cuda")):
        return "torch"
    if name == "cpu" or (name == "auto" and device.type == "cpu"):
        if device.type != "cpu":
            raise BackendUnavailable(f"the cpu backend was chosen for a {device.type} device")
        return "cpu"
    problem = _missing()
    if name == "auto":
        return "torch" if problem else "triton"
    if problem:
        raise BackendUnavailable(f"the triton backend was chosen, but triton cannot be imported: {problem}")
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise BackendUnavailable(
            f"the triton backend was chosen for a {device.type} device: it needs a CUDA device,"
            " or TRITON_INTERPRET=1 in the environment for its slow interpreter"
        )
    return "triton"


def load(backend: Backend) -> Kernels:
    """Returns the computations of this backend."""
    if backend == "triton":
        from twotower_kernels.triton.kernels import TritonKernels

        return TritonKernels()
    if backend == "cpu":
        return CpuKernels()
    return TORCH


def _missing() -> str | None:
    """Why triton cannot be imported, or None. A broken installation raises other errors than a missing one."""
    try:
        importlib.import_module("triton")
    except (ImportError, OSError, RuntimeError) as error:
        return str(error) or type(error).__name__
    return None
