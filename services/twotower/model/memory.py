"""How much memory a tower's process may take for the states of its sessions."""

from __future__ import annotations

import os

import torch

from twotower.sizes import parse_bytes

CPU_SHARE = 0.25
"""Of a machine's memory, where nothing is said: other towers may run on it."""
CUDA_SHARE = 0.6
"""Of what the weights leave of a GPU; the rest is for cached prefixes and activations."""
PREFIX_SHARE = 0.25
"""Of the state memory, what cached prefixes may take beside it."""


def state_budget(option: str, device: torch.device) -> int:
    """Bytes for "auto", or for a size such as "512M" or "40G" (powers of 1024). Raises ConfigError."""
    if option != "auto":
        return parse_bytes(option, "state_memory")
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free * CUDA_SHARE)
    return int(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * CPU_SHARE)


def prefix_budget(option: str, state_bytes: int) -> int:
    """Bytes for "auto", "0" or a size, beside `state_bytes` for states. Raises ConfigError."""
    if option == "auto":
        return int(state_bytes * PREFIX_SHARE)
    return 0 if option == "0" else parse_bytes(option, "prefix_memory")
