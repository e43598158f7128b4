"""Writes a trained checkpoint: weights, config, and the tokenizer in a form that other tools read as well."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from twotower.model.checkpoint import INDEX_FILE, SINGLE_FILE, Checkpoint
from twotower.model.config import ModelConfig
from twotower.model.tensors import CONTEXT_PREFIXES
from twotower.model.weights import save_checkpoint, write_tensors
from twotower.train.bpe import BOS, EOS, MASK, PAD, SPECIAL_TOKENS

TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"

Module = TypeVar("Module", bound=nn.Module)


def write_checkpoint(out: Path, raw: dict[str, Any], tensors: Mapping[str, Tensor], tokenizer: Path) -> None:
    """Write all files of a checkpoint directory. raw: its `config.json`."""
    save_checkpoint(out, raw, tensors)
    write_tokenizer_files(out, tokenizer, raw)
    Checkpoint.open(out, towers=("context",))


def write_sharded(out: Path, raw: dict[str, Any], tensors: Mapping[str, Tensor], tokenizer: Path) -> None:
    """As `write_checkpoint`, with a file for each tower, so that a new denoiser leaves the context's file unchanged."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(raw, indent=1) + "\n", encoding="utf-8")
    files = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    index = {name: files[not name.startswith(CONTEXT_PREFIXES)] for name in sorted(tensors)}
    for file in files:
        write_tensors(out / file, {name: tensor for name, tensor in tensors.items() if index[name] == file})
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    (out / INDEX_FILE).write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": index}), encoding="utf-8")
    (out / SINGLE_FILE).unlink(missing_ok=True)
    write_tokenizer_files(out, tokenizer, raw)
    Checkpoint.open(out)


def write_tokenizer_files(out: Path, tokenizer: Path, raw: Mapping[str, Any]) -> None:
    """`tokenizer.json` and, beside it, what transformers' `AutoTokenizer` needs to read it."""
    if tokenizer.resolve() != (out / TOKENIZER_FILE).resolve():
        shutil.copy(tokenizer, out / TOKENIZER_FILE)
    config = tokenizer_config(tokenizer, ModelConfig.from_dict(dict(raw)).max_position_embeddings)
    (out / TOKENIZER_CONFIG_FILE).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def tokenizer_config(tokenizer: Path, max_length: int) -> dict[str, Any]:
    """The class, and those special tokens of `bpe` that the tokenizer has.

    `clean_up_tokenization_spaces` is off, so that encoded text decodes to itself.
    """
    known = {t["content"] for t in json.loads(tokenizer.read_text(encoding="utf-8")).get("added_tokens", [])}
    names = {"pad_token": PAD, "bos_token": BOS, "eos_token": EOS, "mask_token": MASK}
    special = {name: SPECIAL_TOKENS[i] for name, i in names.items() if SPECIAL_TOKENS[i] in known}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **special,
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
        "add_bos_token": False,
        "add_eos_token": False,
        "padding_side": "left",
    }


@torch.no_grad()
def averaged(model: Module, ema: Mapping[str, Tensor]) -> Module:
    """A copy of the model with averaged weights."""
    other = copy.deepcopy(model)
    for name, parameter in other.named_parameters():
        parameter.copy_(ema[name])
    return other
