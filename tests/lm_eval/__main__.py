"""`make test-lm-eval`: EleutherAI's lm-eval, unchanged, against a stack of its own, with a task of each kind.

lm-eval brings some forty packages, so that it lives in an environment of its own: `python -m tests.lm_eval LM_EVAL`, with the
path of its command.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import twotower

CHECKPOINT = Path(twotower.__file__).parent / "checkpoints" / "word-problems"
TASKS = Path(__file__).parent / "tasks"
LEAST = {"twotower_choice": ("acc,none", 0.9), "twotower_generate": ("exact_match,answer", 0.9)}
"""What the shipped checkpoint gets right of problems like those that it was trained on."""
MOST_PERPLEXITY = 4.0
"""Of whole texts, a word."""


async def run(lm_eval: str) -> int:
    """Whether the results are what they should be, as an exit status."""
    async with _stack() as url:
        with tempfile.TemporaryDirectory() as out:
            place = f"model={CHECKPOINT.name},base_url={url},tokenizer={CHECKPOINT}"
            model = f"{place},num_concurrent=4,max_length=4096"
            process = await asyncio.create_subprocess_exec(
                *(lm_eval, "--model", "local-completions", "--model_args", model, "--batch_size", "4"),
                *("--include_path", str(TASKS), "--tasks", ",".join((*LEAST, "twotower_rolling")), "--output_path", out),
                env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
            )
            if status := await process.wait():
                return status
            results = _results(Path(out))
    short = [f"{task}: {results[task][metric]}" for task, (metric, least) in LEAST.items() if results[task][metric] < least]
    perplexity = results["twotower_rolling"]["word_perplexity,none"]
    if perplexity > MOST_PERPLEXITY:
        short.append(f"twotower_rolling: {perplexity}")
    print("\n".join(short) or "lm-eval: all three kinds of tasks gave what they should")
    return 1 if short else 0


@asynccontextmanager
async def _stack() -> AsyncIterator[str]:
    """A whole stack, as users start it; yields the address of its completions."""
    command = "-m", "twotower.cli.main", "up", "--grpc-port", "0", "--http-port", "0"
    process = await asyncio.create_subprocess_exec(sys.executable, *command, stdout=asyncio.subprocess.PIPE)
    assert process.stdout is not None
    try:
        ready = (await process.stdout.readline()).decode().split()
        if len(ready) != 3:
            raise SystemExit("the stack did not start")
        yield f"http://{ready[2].removeprefix('http=')}/v1/completions"
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
        await process.wait()


def _results(out: Path) -> dict[str, dict[str, float]]:
    """What lm-eval wrote, by task."""
    (written,) = out.rglob("results*.json")
    results: dict[str, dict[str, float]] = json.loads(written.read_text())["results"]
    return results


if __name__ == "__main__":
    sys.exit(asyncio.run(run(sys.argv[1])))
