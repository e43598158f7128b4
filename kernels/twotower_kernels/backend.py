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
    """The Triton kernels were asked for and cannot run here; the message says why, and what would help."""


def resolve(name: str, device: torch.device) -> Backend:
    """The backend for tensors on `device`; "auto" is Triton on a CUDA device where it is installed, and "cpu" on a CPU.

    Triton is imported for no other name and on no other device, so that nothing here needs it.
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
    """The computations in this backend's form."""
    if backend == "triton":
        from twotower_kernels.triton.kernels import TritonKernels

        return TritonKernels()
    if backend == "cpu":
        return CpuKernels()
    return TORCH


def _missing() -> str | None:
    """Why triton cannot be imported, or None. A broken installation fails in other ways than a missing one."""
    try:
        importlib.import_module("triton")
    except (ImportError, OSError, RuntimeError) as error:
        return str(error) or type(error).__name__
    return None
