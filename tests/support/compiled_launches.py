"""Compiles, without a GPU, every kernel that a denoiser step, a commit, an AR step and a prefill launch, for an H200 (sm_90).

Nothing runs: each launch is compiled for what it would be given. The interpreter takes much that the compiler refuses.
Prints one JSON object: by kernel, whether any of its forms uses the tensor cores' asynchronous products.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from twotower.bench.random_tower import random_states, random_tower
from twotower.bench.sizes import REAL
from twotower.engine.context_engine import ContextEngine
from twotower.engine.denoiser_engine import DenoiserEngine
from twotower.model.config import ModelConfig
from twotower.model.context_tower import ContextTower
from twotower.model.denoiser_tower import DenoiserTower
from twotower.model.layers import use_kernels
from twotower.request import GenerationParams
from twotower_kernels.backend import load

CPU = torch.device("cpu")
SIZES = ((1, 100), (3, 3000))
"""Sessions, and tokens of each: attention in one launch, and split over the context."""


class _H200:
    """What Triton asks of a driver before it compiles."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        return CPU


def main() -> None:
    driver.set_active(_H200())
    found: dict[str, bool] = {}
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **constants: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **constants)
        found[self.__name__] = found.get(self.__name__, False) or "wgmma" in kernel.asm["ptx"]
        return kernel

    JITFunction.run = compile_only
    config = ModelConfig.from_dict({**REAL, "hybrid_override_pattern": "ME*", "num_hidden_layers": 3, "n_routed_experts": 8})
    for kind in (DenoiserTower, ContextTower):
        tower, _ = random_tower(kind, config, torch.bfloat16, CPU)
        use_kernels(tower, load("triton"))
        for sessions, tokens in SIZES:
            states = random_states(config, torch.bfloat16, CPU, sessions, tokens)
            assert states is not None
            for graphs in (False, True):
                if isinstance(tower, DenoiserTower):
                    denoiser = DenoiserEngine(tower, graphs=graphs)
                    denoiser.step([denoiser.start(GenerationParams(), state, 0) for state in states])
                    continue
                for length in (16, 1):
                    blocks = torch.zeros(sessions, length, dtype=torch.int64)
                    ContextEngine(tower, graphs=graphs).extend(blocks, states, need_logits=True)
                    for state in states:
                        state.length = tokens
                if not graphs:
                    tower.accept(states, tower.verify(blocks.new_zeros(sessions, 16), states), [9] * sessions)
                    for state in states:
                        state.length = tokens
                    tower.prefill([blocks.new_zeros(16) for _ in states], states)
                    for state in states:
                        state.length = tokens
    _apply_on_a_worker(config)
    print(json.dumps(found))


def _apply_on_a_worker(config: ModelConfig) -> None:
    """Commits change states in the scan's own launch; a worker applies their deltas."""
    heads, length = config.mamba_num_heads, config.block_size
    state = torch.zeros(2, heads, config.mamba_head_dim, config.ssm_state_size)
    x = torch.zeros(2, length, heads, config.mamba_head_dim, dtype=torch.bfloat16)
    b = torch.zeros(2, length, config.n_groups, config.ssm_state_size, dtype=torch.bfloat16)
    load("triton").apply_factors_(state, x, b, torch.zeros(2, length, heads), torch.zeros(heads))


if __name__ == "__main__":
    main()
