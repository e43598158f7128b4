"""`twotower generate` in one process, and what it says of bad input."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.checkpoints import write_tiny_checkpoint
from tests.support.processes import run_cli
from tests.support.tokenizers import VOCAB_SIZE, write_byte_tokenizer
from twotower.cli.main import main


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"), vocab_size=VOCAB_SIZE)
    write_byte_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("bare"))


Capture = pytest.CaptureFixture[str]


def _local(checkpoint: Path, *words: str) -> int:
    return main(["generate", "--local", "--threads", "1", "--checkpoint", str(checkpoint), *words])


@pytest.mark.parametrize("mode", ["diffusion", "ar", "mock-ar"])
def test_modes(checkpoint: Path, mode: str, capsys: Capture) -> None:
    assert _local(checkpoint, "the fox", "--mode", mode, "--max-tokens", "20", "--no-eos", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert len(told["token_ids"]) == 20
    assert told["finish_reason"] == "length"
    assert told["blocks"] == (2 if mode == "diffusion" else 20)


def test_text_is_streamed_and_summed_up(checkpoint: Path, capsys: Capture) -> None:
    assert _local(checkpoint, "the fox", "--max-tokens", "20", "--no-eos") == 0
    streamed = capsys.readouterr()
    assert "[20 tokens, 2 blocks, " in streamed.err
    _local(checkpoint, "the fox", "--max-tokens", "20", "--no-eos", "--json")
    assert json.loads(capsys.readouterr().out)["text"] + "\n" == streamed.out


def test_without_a_tokenizer_ids_go_in_and_out(bare: Path, capsys: Capture) -> None:
    assert _local(bare, "--prompt-ids", "5, 6 7", "--max-tokens", "3", "--no-eos") == 0
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("token ids: ")


def test_stop_strings(checkpoint: Path, capsys: Capture) -> None:
    _local(checkpoint, "the fox", "--max-tokens", "64", "--no-eos", "--json")
    whole = json.loads(capsys.readouterr().out)["text"]
    stop = whole[12:15]
    _local(checkpoint, "the fox", "--max-tokens", "64", "--no-eos", "--stop", stop, "--json")
    told = json.loads(capsys.readouterr().out)
    assert told["text"] == whole[: whole.index(stop)]
    assert told["finish_reason"] == "stop"


@pytest.mark.parametrize("mode", ["diffusion", "ar", "mock-ar"])
def test_logprobs(checkpoint: Path, mode: str, capsys: Capture) -> None:
    words = ("the fox", "--mode", mode, "--max-tokens", "20", "--no-eos", "--json")
    assert _local(checkpoint, *words, "--logprobs", "2") == 0
    told = json.loads(capsys.readouterr().out)
    assert len(told["logprobs"]) == len(told["token_ids"]) == 20
    for token, entry in zip(told["token_ids"], told["logprobs"], strict=True):
        assert entry["top"][0] == {"token_id": token, "logprob": entry["logprob"]}  # greedy
        assert 0 >= entry["logprob"] >= entry["top"][1]["logprob"]
    _local(checkpoint, *words)
    assert "logprobs" not in json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf", "1e18"])
def test_a_timeout_is_a_time(seconds: str, capsys: Capture) -> None:
    assert main(["generate", "a", "--timeout", seconds]) == 1
    assert capsys.readouterr().err.startswith("error: timeout: must be in (0, 1000000000] seconds")


def test_a_block_above_the_trained_size_works_and_warns(checkpoint: Path, capsys: Capture) -> None:
    assert _local(checkpoint, "fox", "--block-size", "32", "--max-tokens", "40", "--no-eos", "--json") == 0
    told = capsys.readouterr()
    assert "block_size 32 is above the 16" in json.loads(told.out)["warnings"][0]
    assert "warning: " in told.err


def test_the_prompt_from_standard_input(checkpoint: Path) -> None:
    words = ("--local", "--checkpoint", checkpoint, "--max-tokens", 5, "--no-eos", "--json")
    results = [run_cli("generate", prompt, *words, stdin="the fox") for prompt in ("-", "the fox")]
    assert json.loads(results[0].stdout)["token_ids"] == json.loads(results[1].stdout)["token_ids"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--prompt-ids", ""], "prompt: is empty"),
        (["--prompt-ids", "5 320"], "prompt: token 320 at position 1"),
        (["--prompt-ids", "-1"], "prompt: token -1"),
        (["--prompt-ids", "5 x"], "prompt-ids: must be integers"),
        ([""], "prompt: is empty"),
        ([], "prompt: give either PROMPT or --prompt-ids"),
        (["a", "--prompt-ids", "5"], "prompt: give either"),
        (["a", "--gamma", "1.5"], "gamma: must be in [0, 1], not 1.5"),
        (["a", "--gamma", "nan"], "gamma: must be in [0, 1]"),
        (["a", "--block-size", "0"], "block_size: must be in [1, 256], not 0"),
        (["a", "--steps", "0"], "steps: must be at least 1"),
        (["a", "--max-tokens", "0"], "max_tokens: must be at least 1"),
        (["a", "--max-tokens", "5000"], "max_tokens: 1 prompt tokens and 5000 to generate exceed the context of 4096"),
        (["a", "--temperature", "-1"], "temperature: must be a finite number"),
        (["a", "--seed", "-1"], "seed: must be in"),
        (["a", "--device", "cuda:99"], "device cuda:99 is not there"),
        (["a", "--json", "--logprobs", "6"], "logprobs: must be in [0, 5], not 6"),
        (["a", "--logprobs", "2"], "logprobs: are printed with --json only"),
        (["a", "--timeout", "5"], "local: nothing waits in one process"),
        (["a", "--priority", "high"], "local: nothing waits in one process"),
    ],
)
def test_bad_input_names_the_field(checkpoint: Path, words: list[str], said: str, capsys: Capture) -> None:
    assert _local(checkpoint, *words) == 1
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith(f"error: {said}")
    assert told.err.count("\n") == 1


def test_text_needs_a_tokenizer(bare: Path, capsys: Capture) -> None:
    assert _local(bare, "hello") == 1
    assert "no tokenizer" in capsys.readouterr().err


def test_no_gateway(capsys: Capture) -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        target = f"127.0.0.1:{sock.getsockname()[1]}"
    assert main(["generate", "hello", "--target", target]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"error: no gateway answers at {target}")
    assert "`twotower up`" in said


def test_mock_ar_is_local(capsys: Capture) -> None:
    assert main(["generate", "hello", "--mode", "mock-ar"]) == 1
    assert capsys.readouterr().err == "error: mode: mock-ar exists only with --local\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["generate", "a", "--mode", "magic"], "error: argument --mode: invalid choice: 'magic'"),
        (["generate", "a", "--gamma", "x"], "error: argument --gamma: invalid float value: 'x'"),
        (["dance"], "error: argument COMMAND: invalid choice: 'dance'"),
    ],
)
def test_usage(words: list[str], said: str, capsys: Capture) -> None:
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(said)


def test_whoever_names_no_command_sees_how(capsys: Capture) -> None:
    with pytest.raises(SystemExit) as caught:
        main([])
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("usage: twotower [-h]")


def test_help_needs_no_torch() -> None:
    result = run_cli("--help")
    assert result.returncode == 0
    words = {line.split()[0] for line in result.stdout.splitlines() if line.startswith("    ") and line.strip()}
    assert {"up", "generate", "conformance", "gateway", "context", "denoiser", "train", "eval", "demo"} <= words
    code = "import sys, twotower.cli.main as m; m.build_parser(); assert not {'torch', 'grpc'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)
