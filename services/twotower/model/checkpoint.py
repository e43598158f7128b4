"""A checkpoint directory, known by its headers alone: config, index, tensor shapes. No torch here.

`Checkpoint.open` reads a few KB, whatever the size of the model, so that every process can refuse a
checkpoint before it loads anything.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from twotower.errors import CheckpointError, ConfigError
from twotower.model.config import PRECISIONS, ModelConfig
from twotower.model.identity import identify, revision_of
from twotower.model.tensors import CONTEXT_PREFIXES, DENOISER_PREFIXES, context_tensors, denoiser_tensors, stored_dtypes
from twotower.request import ModelLimits

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where a tensor lies."""

    file: Path
    dtype: str
    """As safetensors names it: F32, BF16, or what quantized experts are stored in."""
    shape: tuple[int, ...]
    num_bytes: int


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose config and headers fit each other."""

    path: Path
    config: ModelConfig
    identity: str
    """Equal for equal checkpoints: a hash of the config, of the headers of all files (see `model.identity`), of the
    revision, where one is named, and of the precision at which the *context's* experts run, where they are quantized at
    load: contexts of one identity compute the same states, whereas a denoiser's precision touches no state, and is its
    own affair."""
    unsure: str | None
    """Why another checkpoint may have the same identity; None if none can."""
    tensors: Mapping[str, TensorEntry]

    @classmethod
    def open(
        cls,
        path: Path,
        towers: Iterable[str] = ("context", "denoiser"),
        *,
        context_experts: str = "auto",
        revision: str | None = None,
    ) -> Checkpoint:
        """Read config and headers, and check every tensor of the given towers against the config.

        A shard that holds nothing of these towers need not be there. context_experts: precision at which the experts
        of the contexts run, with which this process works (`resolve_experts`). revision: what tells this checkpoint from
        others of the same architecture, where it does not say so itself. Raises CheckpointError, which names the file or
        the tensor, and ConfigError.
        """
        path = Path(path)
        if not path.is_dir():
            raise CheckpointError(
                f"checkpoint {path} is not a directory" if path.exists() else f"checkpoint {path} does not exist"
            )
        if revision == "":
            raise ConfigError("revision: must not be empty")
        config = ModelConfig.from_file(path / "config.json")
        prefixes = tuple(p for tower in towers for p in _PREFIXES[tower])
        index: dict[str, object] | None = None
        headers: dict[str, dict[str, object] | None] = {}
        tensors: dict[str, TensorEntry] = {}
        if (path / INDEX_FILE).exists():
            index, weight_map = _read_index(path / INDEX_FILE)
            needed = {file for name, file in weight_map.items() if name.startswith(prefixes)}
            for file in sorted(set(weight_map.values())):
                try:
                    entries, headers[file] = _read_header(path / file)
                except CheckpointError:
                    if file in needed:
                        raise
                    headers[file] = None
                    continue
                tensors |= {name: entry for name, entry in entries.items() if weight_map.get(name) == file}
        elif (path / SINGLE_FILE).exists():
            tensors, headers[SINGLE_FILE] = _read_header(path / SINGLE_FILE)
        else:
            raise CheckpointError(f"{path} holds neither {SINGLE_FILE} nor {INDEX_FILE}")
        for tower in towers:
            _check_tensors(path, config, tensors, dict(_EXPECTED[tower](config)))
        running = resolve_experts(context_experts, config.context_experts)
        # The other way round, the weights are the same.
        extra = f"context experts {running}" if running != "bf16" and config.context_experts == "bf16" else ""
        identity, unsure = identify(repr(config), index, headers, revision or revision_of(path), extra)
        return cls(path, config, identity, unsure, tensors)

    @classmethod
    def open_shared(
        cls, path: Path, towers: Iterable[str] = ("context", "denoiser"), *, context_experts: str, revision: str | None
    ) -> Checkpoint:
        """`open`, for a process that finds others, and their states, by the identity. Raises ConfigError if that is unsure."""
        checkpoint = cls.open(path, towers, context_experts=context_experts, revision=revision)
        if checkpoint.unsure is not None:
            raise ConfigError(
                f"revision: checkpoint {path} {checkpoint.unsure} so that another model of its shape could be taken for it; "
                "give all services of this checkpoint the same --revision NAME"
            )
        return checkpoint

    @property
    def limits(self) -> ModelLimits:
        """What decides whether a request can be served."""
        config = self.config
        return ModelLimits(
            vocab_size=config.vocab_size,
            max_context=config.max_position_embeddings,
            block_size=config.block_size,
            mask_token_id=config.mask_token_id,
            eos_token_ids=config.eos_token_ids,
        )

    @property
    def tokenizer_path(self) -> Path | None:
        """`tokenizer.json`, if the checkpoint has one."""
        path = self.path / "tokenizer.json"
        return path if path.exists() else None


def resolve_experts(asked: str, stored: str) -> str:
    """The precision that routed experts run at: "auto", as they are stored, or one of PRECISIONS. Raises ConfigError.

    "bf16" of quantized ones: unpacked, with the same values.
    """
    if asked not in ("auto", *PRECISIONS):
        raise ConfigError(f"experts: must be auto, {', '.join(PRECISIONS)}, not {asked!r}")
    if asked in ("auto", stored):
        return stored
    if stored != "bf16" and asked != "bf16":
        raise ConfigError(f"experts: the checkpoint stores them in {stored}, and only the original can be quantized to {asked}")
    return asked


_PREFIXES = {"context": CONTEXT_PREFIXES, "denoiser": DENOISER_PREFIXES}
_EXPECTED = {"context": context_tensors, "denoiser": denoiser_tensors}


def _read_index(path: Path) -> tuple[dict[str, object], dict[str, str]]:
    """The whole index, as Hugging Face writes it, and in it tensor name -> file."""
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        return index, {str(name): str(file) for name, file in index["weight_map"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is no safetensors index: {error!r}") from None


def _read_header(path: Path) -> tuple[dict[str, TensorEntry], dict[str, object]]:
    """The header of a safetensors file: 8 bytes of length, then JSON; the file's size must fit it."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else -1
            if not 0 <= length <= min(MAX_HEADER_BYTES, size - 8):
                raise CheckpointError(f"{path} is truncated or no safetensors file")
            raw = file.read(length)
        header = json.loads(raw)
        entries = {
            str(name): TensorEntry(
                path, str(e["dtype"]), tuple(map(int, e["shape"])), int(e["data_offsets"][1]) - int(e["data_offsets"][0])
            )
            for name, e in header.items()
            if name != "__metadata__"
        }
        end = 8 + length + max((int(e["data_offsets"][1]) for n, e in header.items() if n != "__metadata__"), default=0)
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise CheckpointError(f"{path} has a damaged header: {error!r}") from None
    if size != end:
        raise CheckpointError(f"{path} is truncated or damaged: {size} bytes where its header says {end}")
    return entries, header


def _check_tensors(
    path: Path, config: ModelConfig, tensors: Mapping[str, TensorEntry], expected: Mapping[str, tuple[int, ...]]
) -> None:
    for name, shape in expected.items():
        entry = tensors.get(name)
        if entry is None:
            raise CheckpointError(f"{path}: tensor {name} is missing")
        if entry.shape != shape:
            raise CheckpointError(f"{path}: tensor {name} has shape {list(entry.shape)}, config.json asks for {list(shape)}")
        if entry.dtype not in (known := stored_dtypes(config, name)):
            raise CheckpointError(f"{path}: tensor {name} has dtype {entry.dtype}; supported: {', '.join(known)}")
