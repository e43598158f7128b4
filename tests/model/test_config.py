"""config.json: what is taken, what is refused, and that the message names the key."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tests.support.checkpoints import TINY
from twotower.errors import CheckpointError
from twotower.model.config import ModelConfig


def test_infinity_is_read(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(TINY))
    assert "Infinity" in path.read_text()
    config = ModelConfig.from_file(path)
    assert config.time_step_limit == (0.0, math.inf)
    assert config.layers_of("M") == (0, 4)
    assert config.eos_token_ids == (2,)
    assert (config.block_size, config.mask_token_id) == (16, 3)


def test_several_eos_tokens() -> None:
    assert ModelConfig.from_dict({**TINY, "eos_token_id": [2, 5]}).eos_token_ids == (2, 5)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"hidden_size": "32"}, "hidden_size"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"hidden_size": None}, "hidden_size"),
        ({"vocab_size": True}, "vocab_size"),
        ({"hybrid_override_pattern": "MXE"}, "hybrid_override_pattern"),
        ({"num_hidden_layers": 3}, "num_hidden_layers"),
        ({"mamba_num_heads": None}, "mamba_num_heads"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok"),
        ({"mlp_hidden_act": "gelu"}, "mlp_hidden_act"),
        ({"use_bias": True}, "use_bias"),
        ({"torch_dtype": "float16"}, "torch_dtype"),
        ({"mask_token_id": 96}, "mask_token_id"),
        ({"eos_token_id": [2, 400]}, "eos_token_id"),
        ({"time_step_limit": 3}, "time_step_limit"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointError, match=named):
        ModelConfig.from_dict({**TINY, **change})


@pytest.mark.parametrize("content", ["", "[]", "{", "\x00\xff"])
def test_files_that_are_no_config(tmp_path: Path, content: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        ModelConfig.from_file(path)
