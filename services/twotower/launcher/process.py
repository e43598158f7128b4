"""One service as a child process: its start, ready line, output and stop. It never outlives its parent."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from asyncio.subprocess import Process
from collections.abc import Callable, Mapping, Sequence

from twotower.errors import ServiceFailed
from twotower.launcher import leash
from twotower.settings.declare import PREFIX
from twotower.tasks import end_tasks

LINE_BYTES = 1 << 20
SPINS = "100000"
"""How long a thread of a parallel operation spins for the next one before it yields its core: about 0.2 ms."""
TAIL = 20
"""Lines of stderr that are kept to explain an end."""

CRASHES = (signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGSEGV)
"""Signals that a process causes itself."""

Say = Callable[[str], None]


class ServiceProcess:
    """A child process and the end of its output. `start` may be called again after it has ended."""

    def __init__(
        self,
        name: str,
        argv: Sequence[str],
        say: Say,
        *,
        env: Mapping[str, str] | None = None,
        parent_death: signal.Signals = signal.SIGKILL,
    ) -> None:
        """`say` is called with each line of the child's stderr, after its name. `env`: variables added to ours from its next
        start on. Our own settings are not passed on, since they may mean something else to the child.

        Secrets belong in `env`: every user of the machine can read a command line. `parent_death`: the signal it gets when
        this process dies, however that is.
        """
        self.name = name
        self.argv = list(argv)
        self.env = dict(env or {})
        self._parent_death = parent_death
        self._say = say
        self._process: Process | None = None
        self.addresses: dict[str, str] = {}
        """The addresses of the last ready line."""
        self._tail: list[str] = []
        self._starting = False
        self._relay: asyncio.Task[None] | None = None
        self._drain: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int | None:
        """The running child's process id."""
        return self._process.pid if self._process is not None and self._process.returncode is None else None

    async def start(self) -> None:
        """Start the child. Raises ServiceFailed."""
        self._tail, self._starting = [], True
        try:
            self._process = await asyncio.create_subprocess_exec(
                *_leashed(self.argv, self._parent_death),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                limit=LINE_BYTES,
                # With its own session, Ctrl-C in the terminal reaches only the launcher, which drains in order.
                start_new_session=True,
                env={"GOMP_SPINCOUNT": SPINS, **_not_ours(os.environ), **self.env},
            )
        except OSError as error:
            raise ServiceFailed(f"{self.name} cannot be started: {error}") from None
        self._relay = asyncio.create_task(self._relay_stderr(self._process))

    async def wait_ready(self, timeout_s: float) -> dict[str, str]:
        """Wait for the ready line; returns its addresses, e.g. ``{"grpc": "127.0.0.1:50051"}``. Raises ServiceFailed."""
        process = self._running()
        assert process.stdout is not None
        try:
            async with asyncio.timeout(timeout_s):
                while line := await process.stdout.readline():
                    words = line.decode(errors="replace").split()
                    if words[:1] == ["ready"]:
                        self._starting = False
                        self._drain = asyncio.create_task(_discard(process.stdout))
                        self.addresses = dict(word.split("=", 1) for word in words[1:] if "=" in word)
                        return self.addresses
        except TimeoutError:
            raise ServiceFailed(f"{self.name} was not ready within {timeout_s:.0f} s") from None
        await self.wait()
        raise ServiceFailed(self.explain())

    async def wait(self) -> int:
        """Wait until the child has ended and all its output is relayed; returns its exit status."""
        code = await self._running().wait()
        if self._relay is not None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(asyncio.shield(self._relay), 1)
        return code

    def explain(self) -> str:
        """Why the child ended, in the words of its last output if there was any."""
        for line in reversed(self._tail):
            if line.startswith("error: "):
                return f"{self.name}: {line.removeprefix('error: ')}"
        code = self._process.returncode if self._process is not None else None
        if code is not None and code < 0:
            how = f"was killed by signal {-code}"
            if -code not in CRASHES:  # another process sent the signal, and the last output is not the reason
                return f"{self.name} {how}"
        else:
            how = f"ended with status {code}"
        return f"{self.name} {how}" + (f": {self._tail[-1]}" if self._tail else "")

    async def stop(self, grace_s: float, hurry: asyncio.Event | None = None) -> None:
        """Send SIGTERM, and SIGKILL after `grace_s` or when `hurry` is set; returns when the child has ended."""
        if (process := self._process) is None:
            return
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
            hurried = asyncio.create_task((hurry or asyncio.Event()).wait())
            ended = asyncio.create_task(process.wait())
            try:
                await asyncio.wait((ended, hurried), timeout=grace_s, return_when=asyncio.FIRST_COMPLETED)
                if not ended.done():
                    in_time = "before the second signal" if hurried.done() else f"within {grace_s:.0f} s"
                    self._say(f"[{self.name}] did not drain {in_time}: killed")
            finally:
                await end_tasks(hurried, ended)
        await self.kill()

    async def kill(self) -> None:
        """Send SIGKILL, which ends a suspended process too, and wait for the end."""
        if (process := self._process) is None:
            return
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
        await self.wait()
        await end_tasks(*(task for task in (self._relay, self._drain) if task is not None))

    def _running(self) -> Process:
        assert self._process is not None, "start it first"
        return self._process

    async def _relay_stderr(self, process: Process) -> None:
        assert process.stderr is not None
        while line := await _readline(process.stderr):
            text = line.decode(errors="replace").rstrip()
            self._tail = [*self._tail[-TAIL + 1 :], text]
            # The caller of `start` reports once why it did not start (`explain`).
            if not (self._starting and text.startswith("error: ")):
                self._say(f"[{self.name}] {text}")


async def _readline(stream: asyncio.StreamReader) -> bytes:
    """A line; an endless line comes in pieces."""
    try:
        return await stream.readline()
    except ValueError:  # longer than LINE_BYTES, and dropped by the reader
        return b"(a very long line)\n"


async def _discard(stream: asyncio.StreamReader) -> None:
    """Read and drop output, so that the pipe never fills."""
    while await stream.read(4096):
        pass


def _not_ours(environ: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environ.items() if not name.startswith(PREFIX)}


def _leashed(argv: Sequence[str], parent_death: signal.Signals) -> list[str]:
    """`argv` behind a leash, so that it cannot outlive this process. With -I -S the leash starts in milliseconds."""
    return [sys.executable, "-I", "-S", leash.__file__, str(os.getpid()), str(int(parent_death)), *argv]
