"""Reference vectors: `cases.json` and `states.safetensors` beside a checkpoint."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from twotower.errors import InvalidArgument
from twotower.request import GenerationParams, Mode, cut_block

MODES = {"ar": Mode.AR, "mock_ar": Mode.MOCK_AR, "mask_diffusion": Mode.DIFFUSION}


@dataclass(frozen=True, slots=True)
class Case:
    """A request and what the reference answers."""

    name: str
    prompt: list[int]
    params: GenerationParams
    token_ids: list[int]
    """Cut after the first end-of-sequence token, as a service returns them."""
    forwards: int | None
    """Denoiser forwards; None where the reference does not count them."""

    def differences(self, token_ids: list[int], forwards: int) -> list[str]:
        """What is not as in the reference."""
        found = []
        if token_ids != self.token_ids:
            same = next((i for i, (a, b) in enumerate(zip(token_ids, self.token_ids, strict=False)) if a != b), None)
            where = f"from token {same}" if same is not None else f"in length: {len(token_ids)} for {len(self.token_ids)}"
            found.append(f"tokens differ {where}")
        if self.forwards is not None and forwards != self.forwards:
            found.append(f"{forwards} forwards for {self.forwards}")
        return found


def load_cases(directory: Path) -> list[Case]:
    """All cases of a set, those of AR once more in speculative mode. Raises InvalidArgument."""
    path = directory / "cases.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(raw, list) or not raw:
            raise ValueError("expected a list of cases")
        cases = [_case(i, entry) for i, entry in enumerate(raw)]
        return cases + [_speculative(case) for case in cases if case.params.mode is Mode.AR]
    except (FileNotFoundError, NotADirectoryError):
        raise InvalidArgument("DIR", f"{path} does not exist") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidArgument("DIR", f"{path} does not hold cases: {error!r}") from None


def _speculative(case: Case) -> Case:
    """The same request in speculative mode, every draft in one forward: whatever they are, the tokens are AR's."""
    params = dataclasses.replace(case.params, mode=Mode.SPECULATIVE, steps=1)
    return Case(case.name.replace("(ar,", "(ar, speculative,"), case.prompt, params, case.token_ids, None)


def _case(index: int, raw: dict[str, Any]) -> Case:
    mode = MODES[raw["mode"]]
    eos = raw.get("eos_token_id")
    params = GenerationParams(mode=mode, max_tokens=raw["max_new_tokens"], eos_token_ids=() if eos is None else (eos,))
    if mode is Mode.DIFFUSION:
        params = GenerationParams(
            mode=mode,
            max_tokens=params.max_tokens,
            eos_token_ids=params.eos_token_ids,
            block_size=raw["block_size"],
            steps=raw["steps_per_block"],
            gamma=raw["confidence_threshold"],
        )
    expected, _ = cut_block(raw["output_ids"], params.max_tokens, params.eos_token_ids)
    name = f"case {index} ({raw['mode']}, prompt of {len(raw['prompt_ids'])})"
    return Case(name, raw["prompt_ids"], params, expected, raw.get("nfe"))
