from __future__ import annotations

import os

import pytest
import torch

from twotower.errors import ConfigError
from twotower.model.memory import state_budget
from twotower.sizes import parse_bytes


@pytest.mark.parametrize(("option", "expected"), [("512M", 512 << 20), ("40g", 40 << 30), ("1.5K", 1536), ("1000", 1000)])
def test_sizes(option: str, expected: int) -> None:
    assert parse_bytes(option, "size") == state_budget(option, torch.device("cpu")) == expected


@pytest.mark.parametrize("option", ["", "much", "-1G", "0", "nan", "infG", "3X", "G", "9999999T"])
def test_what_is_no_size(option: str) -> None:
    with pytest.raises(ConfigError, match=r"^size: must be"):
        parse_bytes(option, "size")


def test_auto_is_a_share_of_the_machine() -> None:
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < state_budget("auto", torch.device("cpu")) < machine / 2
