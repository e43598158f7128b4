"""Sizes as people write them."""

from __future__ import annotations

from twotower.errors import ConfigError

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def parse_bytes(option: str, name: str) -> int:
    """ "512M" -> 536870912. Raises ConfigError, which names the option."""
    number, unit = (option[:-1], option[-1].upper()) if option and not option[-1].isdigit() else (option, "")
    try:
        count = float(number) * _UNITS[unit]
    except (KeyError, ValueError):
        raise ConfigError(f"{name}: must be a size such as 512M or 40G, not {option!r}") from None
    if not 1 <= count < 1 << 60:  # also refuses NaN
        raise ConfigError(f"{name}: must be a size between a byte and an exabyte, not {option!r}")
    return int(count)
