"""A small set of vectors of our own making, in the form of the reference's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from twotower.engine.local import LocalEngine
from twotower.request import GenerationParams, Mode

NAMES = {Mode.AR: "ar", Mode.MOCK_AR: "mock_ar", Mode.DIFFUSION: "mask_diffusion"}


def write_cases(checkpoint: Path) -> list[dict[str, Any]]:
    """Write `cases.json` beside a checkpoint: what this engine answers, over modes, block sizes, gammas and ends."""
    engine = LocalEngine(checkpoint, dtype="float32", threads=1)
    cases: list[dict[str, Any]] = []
    for prompt in ([5], [6, 7, 8], list(range(4, 60))):
        for mode in (Mode.AR, Mode.MOCK_AR):
            cases.append(_case(engine, prompt, GenerationParams(mode=mode, max_tokens=12)))
        for size, steps, gamma in ((16, 16, 0.8), (16, 4, 0.9), (8, 8, 0.3)):
            cases.append(_case(engine, prompt, GenerationParams(max_tokens=32, block_size=size, steps=steps, gamma=gamma)))
    eos = cases[2]["output_ids"][18]
    cases.append(_case(engine, [5], GenerationParams(max_tokens=32, gamma=0.8, eos_token_ids=(eos,))))
    (checkpoint / "cases.json").write_text(json.dumps(cases))
    return cases


def _case(engine: LocalEngine, prompt: list[int], params: GenerationParams) -> dict[str, Any]:
    result = engine.generate(prompt, params)
    case: dict[str, Any] = {
        "mode": NAMES[params.mode],
        "prompt_ids": prompt,
        "max_new_tokens": params.max_tokens,
        "output_ids": result.token_ids,
    }
    if params.mode is Mode.DIFFUSION:
        case |= {"block_size": params.block_size, "steps_per_block": params.steps, "confidence_threshold": params.gamma}
        case["nfe"] = result.forwards
    if params.eos_token_ids:
        case["eos_token_id"] = params.eos_token_ids[0]
    return case
