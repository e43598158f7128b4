"""One service as a child process: started, known to be ready, relayed, stopped. It never outlives its parent."""

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
"""How long a thread of a parallel operation watches for the next one, before it leaves its core to others: some 0.2 ms."""
KEEP_HEAP = ":".join(
    f"glibc.malloc.{name}={value}"
    for name, value in (("mmap_threshold", 32 << 20), ("trim_threshold", 1 << 30), ("top_pad", 64 << 20))
)
"""What a forward frees stays with its process: given back, the next forward takes it from the system anew, page by page."""
TAIL = 20
"""Lines of stderr that are kept to explain a death."""

CRASHES = (signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGSEGV)
"""Signals that a process gets for what it did itself."""

Say = Callable[[str], None]


class ServiceProcess:
    """A child, and the last it said. `start` may be called again after it ended."""

    def __init__(
        self,
        name: str,
        argv: Sequence[str],
        say: Say,
        *,
        env: Mapping[str, str] | None = None,
        parent_death: signal.Signals = signal.SIGKILL,
    ) -> None:
        """`say` is given each line of its stderr, after its name. `env`: what its environment has beyond ours, from its next
        start on. Our own settings are not handed on, since they may mean another thing to it.

        Secrets belong in `env`: every user of the machine can read a command line. `parent_death`: what it is sent when
        this process dies, however that is.
        """
        self.name = name
        self.argv = list(argv)
        self.env = dict(env or {})
        self._parent_death = parent_death
        self._say = say
        self._process: Process | None = None
        self.addresses: dict[str, str] = {}
        """Of its last ready line."""
        self._tail: list[str] = []
        self._starting = False
        self._relay: asyncio.Task[None] | None = None
        self._drain: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int | None:
        """Of the running child."""
        return self._process.pid if self._process is not None and self._process.returncode is None else None

    async def start(self) -> None:
        """Spawn it. Raises ServiceFailed."""
        self._tail, self._starting = [], True
        try:
            self._process = await asyncio.create_subprocess_exec(
                *_leashed(self.argv, self._parent_death),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                limit=LINE_BYTES,
                # A session of its own: Ctrl-C in the terminal reaches the launcher alone, which drains in order.
                start_new_session=True,
                env={"GOMP_SPINCOUNT": SPINS, "GLIBC_TUNABLES": KEEP_HEAP, **_not_ours(os.environ), **self.env},
            )
        except OSError as error:
            raise ServiceFailed(f"{self.name} cannot be started: {error}") from None
        self._relay = asyncio.create_task(self._relay_stderr(self._process))

    async def wait_ready(self, timeout_s: float) -> dict[str, str]:
        """The addresses of its ready line, e.g. ``{"grpc": "127.0.0.1:50051"}``. Raises ServiceFailed."""
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
        """Its exit status, once it ended and all it said is relayed."""
        code = await self._running().wait()
        if self._relay is not None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(asyncio.shield(self._relay), 1)
        return code

    def explain(self) -> str:
        """Why it ended, in its own words if it had any."""
        for line in reversed(self._tail):
            if line.startswith("error: "):
                return f"{self.name}: {line.removeprefix('error: ')}"
        code = self._process.returncode if self._process is not None else None
        if code is not None and code < 0:
            how = f"was killed by signal {-code}"
            if -code not in CRASHES:  # somebody else did, and what it said last was no reason
                return f"{self.name} {how}"
        else:
            how = f"ended with status {code}"
        return f"{self.name} {how}" + (f": {self._tail[-1]}" if self._tail else "")

    async def stop(self, grace_s: float, hurry: asyncio.Event | None = None) -> None:
        """SIGTERM, and after `grace_s`, or when `hurry` is set, SIGKILL. Nothing is left running."""
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
        """SIGKILL, which a stopped process obeys too, and wait until it has ended."""
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
            # Why it did not start is for whoever started it to say (`explain`), once.
            if not (self._starting and text.startswith("error: ")):
                self._say(f"[{self.name}] {text}")


async def _readline(stream: asyncio.StreamReader) -> bytes:
    """A line; an endless one in pieces."""
    try:
        return await stream.readline()
    except ValueError:  # longer than LINE_BYTES, and dropped by the reader
        return b"(a very long line)\n"


async def _discard(stream: asyncio.StreamReader) -> None:
    """Read what no one wants, so that the pipe never fills."""
    while await stream.read(4096):
        pass


def _not_ours(environ: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environ.items() if not name.startswith(PREFIX)}


def _leashed(argv: Sequence[str], parent_death: signal.Signals) -> list[str]:
    """`argv` such that it cannot outlive this process. -I -S: the leash needs nothing, and starts in milliseconds."""
    return [sys.executable, "-I", "-S", leash.__file__, str(os.getpid()), str(int(parent_death)), *argv]
