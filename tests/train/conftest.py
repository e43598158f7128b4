from __future__ import annotations

import itertools
from typing import Any

import pytest
from tokenizers import Tokenizer

from twotower.model.config import ModelConfig
from twotower.train.bpe import train_tokenizer
from twotower.train.families.stories.problems import problems
from twotower.train.start import WORD_PROBLEMS

TINY: dict[str, Any] = {
    **WORD_PROBLEMS,
    "torch_dtype": "float32",
    "vocab_size": 320,
    "hidden_size": 32,
    "num_hidden_layers": 5,
    "hybrid_override_pattern": "M*E-M",
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "ssm_state_size": 8,
    "intermediate_size": 64,
    "n_routed_experts": 4,
    "moe_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 32,
    "routed_scaling_factor": 1.5,
}


@pytest.fixture
def config() -> ModelConfig:
    return ModelConfig.from_dict(TINY)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_tokenizer((p.question + "\n" + p.solution for p in itertools.islice(problems("train", 1), 500)), 320)


@pytest.fixture(scope="session")
def full_tokenizer() -> Tokenizer:
    """With the vocabulary of the shipped one."""
    texts = (f"{p.question}\n{p.solution}" for p in itertools.islice(problems("train", 0), 4000))
    return train_tokenizer(texts)
