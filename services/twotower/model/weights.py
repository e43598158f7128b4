"""Loading one tower from a checkpoint, memory-mapped, and writing a checkpoint."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from twotower.errors import CheckpointError, ConfigError
from twotower.model.checkpoint import SINGLE_FILE, Checkpoint, resolve_experts
from twotower.model.context_tower import ContextTower
from twotower.model.denoiser_tower import DenoiserTower
from twotower.model.experts import ExpertStacks
from twotower.model.identity import CONTENT_KEY
from twotower.model.layers import Mamba2, MoE, use_kernels
from twotower.model.packed import PackedExperts
from twotower.model.tensors import context_tensors, denoiser_tensors
from twotower_kernels.backend import Backend, BackendUnavailable, load, resolve

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# Small, and sensitive to rounding: kept in fp32 whatever the model's dtype is.
_ALWAYS_FP32 = re.compile(r"(norm\w*\.weight|A_log|\.D|dt_bias|e_score_correction_bias)$")
# The router computes in fp64 from the checkpoint's values; rounding them first would change its choices.
_ROUTER = re.compile(r"gate\.weight$")


@dataclass
class ReadLog:
    """What was read of a checkpoint's tensors."""

    names: list[str] = field(default_factory=list)
    num_bytes: int = 0


def resolve_dtype(name: str, checkpoint: Checkpoint) -> torch.dtype:
    """auto, float32 or bfloat16 -> torch dtype. Raises ConfigError."""
    name = checkpoint.config.torch_dtype if name == "auto" else name
    if name not in DTYPES:
        raise ConfigError(f"dtype must be auto, float32 or bfloat16, not {name!r}")
    return DTYPES[name]


def resolve_device(name: str) -> torch.device:
    """auto, cpu, cuda or cuda:N -> torch device. Raises ConfigError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device must be auto, cpu, cuda or cuda:N, not {name!r}") from None
    if device.type == "cuda" and not (torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count()):
        raise ConfigError(f"device {name} is not there: this machine has {torch.cuda.device_count()} CUDA devices")
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device must be auto, cpu, cuda or cuda:N, not {name!r}")
    return device


def resolve_kernels(name: str, device: torch.device) -> Backend:
    """auto, torch, cpu or triton -> what computes on this device. Raises ConfigError."""
    try:
        return resolve(name, device)
    except BackendUnavailable as error:
        raise ConfigError(f"kernels: {error}") from None


def load_context_tower(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device,
    log: ReadLog | None = None,
    *,
    experts: str = "auto",
    kernels: str = "auto",
) -> ContextTower:
    """The context tower; no tensor of the denoiser is read.

    experts: see `resolve_experts`; kernels: see `resolve_kernels`.
    Raises CheckpointError, ConfigError.
    """
    config, backend = checkpoint.config, resolve_kernels(kernels, device)
    with torch.device("meta"):
        tower = ContextTower(config)
    stacks = ExpertStacks(config.context_experts, resolve_experts(experts, config.context_experts), dtype, device, backend)
    _load(tower, checkpoint, dict(context_tensors(config)), dtype, device, log or ReadLog(), stacks)
    use_kernels(tower, load(backend))
    return tower


def load_denoiser_tower(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device,
    log: ReadLog | None = None,
    *,
    experts: str = "auto",
    kernels: str = "auto",
) -> DenoiserTower:
    """The denoiser tower; no tensor of the context tower is read. Options and errors as in `load_context_tower`."""
    config, backend = checkpoint.config, resolve_kernels(kernels, device)
    with torch.device("meta"):
        tower = DenoiserTower(config)
    stacks = ExpertStacks(config.denoiser_experts, resolve_experts(experts, config.denoiser_experts), dtype, device, backend)
    _load(tower, checkpoint, dict(denoiser_tensors(config)), dtype, device, log or ReadLog(), stacks)
    use_kernels(tower, load(backend))
    return tower


def save_checkpoint(path: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write `config.json` and `model.safetensors`, with a hash of the content in the header.

    config: as in the published `config.json`; tensors: by the checkpoint's names (see `export_tensors`).
    """
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    write_tensors(path / SINGLE_FILE, tensors)


def write_tensors(file: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write a safetensors file, with a hash of the content in the header; returns that hash."""
    tensors = {name: tensors[name].detach().contiguous().cpu() for name in sorted(tensors)}
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(name.encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    save_file(tensors, file, metadata={"format": "pt", CONTENT_KEY: digest.hexdigest()})
    return digest.hexdigest()


def export_tensors(tower: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """A tower's parameters by the checkpoint's names, experts one by one, matrices in `dtype`."""
    out: dict[str, Tensor] = {}
    for name, parameter in tower.named_parameters():
        keep = _ALWAYS_FP32.search(name) and not name.endswith("norm.weight")
        tensor = parameter.detach().to(torch.float32 if keep else dtype)
        if name.endswith(("experts.up_proj", "experts.down_proj")) and tensor.dim() == 3:
            stem, kind = name.rsplit(".", 1)
            out |= {f"{stem}.{e}.{kind}.weight": tensor[e].clone() for e in range(tensor.shape[0])}
        else:
            out[name] = tensor
    return out


def read_tensors(checkpoint: Checkpoint, names: Iterable[str]) -> dict[str, Tensor]:
    """Tensors as the checkpoint holds them. Raises CheckpointError."""
    return {name: tensor.clone() for name, tensor in _read(checkpoint, list(names), ReadLog())}


def _load(
    tower: nn.Module,
    checkpoint: Checkpoint,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    device: torch.device,
    log: ReadLog,
    stacks: ExpertStacks,
) -> None:
    for name, tensor in _read(checkpoint, list(shapes), log):
        if not stacks.take(name, tensor, checkpoint.config.n_routed_experts):
            set_parameter(tower, name, tensor.to(device, loaded_dtype(name, dtype)))
    for moe, up, down in stacks.layers(checkpoint.config):
        if isinstance(up, Tensor) and isinstance(down, Tensor):
            set_parameter(tower, f"{moe}.experts.up_proj", up)
            set_parameter(tower, f"{moe}.experts.down_proj", down)
        else:
            assert not isinstance(up, Tensor)
            assert not isinstance(down, Tensor)
            layer = tower.get_submodule(moe)
            assert isinstance(layer, MoE)
            layer.pack(PackedExperts(up, down))
    tower.to(device)  # moves the computed buffers; the parameters are there already
    assert not any(p.is_meta for p in tower.parameters())
    tower.requires_grad_(False).eval()
    for module in tower.modules():
        if isinstance(module, MoE | Mamba2):
            module.prepare()


def loaded_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """What a parameter of this name is kept in, in a model of this dtype."""
    if _ROUTER.search(name):
        return torch.float64
    return torch.float32 if _ALWAYS_FP32.search(name) else dtype


def set_parameter(tower: nn.Module, name: str, tensor: Tensor) -> None:
    """Put a tensor where the meta device left a parameter without values."""
    owner, _, leaf = name.rpartition(".")
    module = tower.get_submodule(owner)
    parameter = nn.Parameter(tensor, requires_grad=False)
    if isinstance(module, nn.ParameterList):
        module[int(leaf)] = parameter
    else:
        setattr(module, leaf, parameter)


def _read(checkpoint: Checkpoint, names: list[str], log: ReadLog) -> Iterator[tuple[str, Tensor]]:
    """The named tensors, file by file; each is a view of the mapped file until it is converted."""
    by_file: dict[Path, list[str]] = {}
    for name in names:
        by_file.setdefault(checkpoint.tensors[name].file, []).append(name)
    for file, wanted in by_file.items():
        try:
            with safe_open(file, framework="pt") as reader:
                for name in wanted:
                    tensor = reader.get_tensor(name)
                    log.names.append(name)
                    log.num_bytes += tensor.numel() * tensor.element_size()
                    yield name, tensor
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} cannot be read: {error}") from None
