"""How much memory a tower's process may take for the states of its sessions."""

from __future__ import annotations

import os

import torch

from twotower.errors import ConfigError

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}

CPU_SHARE = 0.25
"""Of a machine's memory, where nothing is said: other towers may run on it."""
CUDA_SHARE = 0.8
"""Of what the weights leave of a GPU; the rest is for activations."""


def state_budget(option: str, device: torch.device) -> int:
    """Bytes for "auto", or for a size such as "512M" or "40G" (powers of 1024). Raises ConfigError."""
    if option != "auto":
        return parse_bytes(option)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free * CUDA_SHARE)
    return int(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * CPU_SHARE)


def parse_bytes(option: str) -> int:
    """ "512M" -> 536870912. Raises ConfigError."""
    number, unit = (option[:-1], option[-1].upper()) if option and not option[-1].isdigit() else (option, "")
    try:
        count = float(number) * _UNITS[unit]
    except (KeyError, ValueError):
        raise ConfigError(f"state_memory: must be auto or a size such as 512M or 40G, not {option!r}") from None
    if not 1 <= count < 1 << 60:  # also refuses NaN
        raise ConfigError(f"state_memory: must be a size between a byte and an exabyte, not {option!r}")
    return int(count)
