"""A denoiser of your own for a context tower that exists: your texts, the training, and what it writes.

    python examples/custom_denoiser.py --minutes 10 --out runs/terse

A checkpoint's context tower is frozen, so one can have several denoisers, each for a task. This one answers the word problems
of the checkpoint that ships in one line, without telling its steps. The context tower's tensors are copied bit for bit.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import twotower

SHIPPED = Path(twotower.__file__).parent / "checkpoints" / "word-problems"
PROMPT = "Tom owns 12 pens. On Friday he buys 6 more. On Saturday he loses 4 of them. How many pens does Tom have?"


def run(*words: object) -> str:
    """`twotower WORDS`; what it prints on stdout. What it reports on the way goes to our stderr."""
    argv = [sys.executable, "-m", "twotower.cli.main", *map(str, words)]
    return subprocess.run(argv, stdout=subprocess.PIPE, text=True, check=True).stdout


def write_texts(path: Path, count: int) -> None:
    """A prompt and a completion in each line, as JSON. Here: built-in problems, each with the last line of its solution."""
    run("train", "corpus", "--out", path, "--count", count)
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        text = json.loads(line)
        lines.append(json.dumps({"prompt": text["prompt"], "completion": text["completion"].strip().splitlines()[-1]}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    """Texts, training, and the same prompt to both denoisers."""
    parser = argparse.ArgumentParser(description="Train a denoiser for the context tower that ships.")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--texts", type=int, default=20_000, metavar="N", help="to train on (default 20000)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the new checkpoint, with both towers")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as scratch:
        texts = Path(scratch) / "texts.jsonl"
        write_texts(texts, args.texts)
        training = ("--minutes", args.minutes, "--device", args.device, "--run-dir", Path(scratch) / "run", "--out", args.out)
        run("train", "denoiser", "--context", SHIPPED, "--init", SHIPPED, "--corpus", texts, *training)

    for checkpoint in (SHIPPED, args.out):
        answer = json.loads(run("generate", "--local", "--checkpoint", checkpoint, "--max-tokens", 96, "--json", PROMPT))
        print(
            f"[{checkpoint.name}: {len(answer['token_ids'])} tokens, {answer['forwards']} forwards]\n{answer['text'].strip()}\n"
        )
    print(f"serve it with: twotower up --checkpoint {args.out}")


if __name__ == "__main__":
    main()
