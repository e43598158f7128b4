"""The ratios that this project promises, measured on one machine and kept as one JSON object.

Machines are noisy, and two figures are comparable only if they were measured side by side. So the two sides of a ratio
are measured in turns, several times, and the median of the ratios is kept.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from twotower.bench.engine import open_engine, plain_engine, run_batch, run_plain
from twotower.bench.machine import Machine, this_commit, this_machine
from twotower.bench.serving import closed_loop
from twotower.bench.sizes import delta_bytes
from twotower.bench.workload import Workload
from twotower.engine.local import LocalEngine
from twotower.engine.thread import EngineThread
from twotower.errors import ConfigError
from twotower.eval.config import EvalConfig
from twotower.eval.measure import Evaluation
from twotower.launcher.config import on_free_ports
from twotower.launcher.stack import stack

SCHEMA = 1

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Ratios:
    """The ratios that are compared over time."""

    engine_over_plain: float
    """Tokens a second of one request: our engine over the plain way to run the model."""
    services_over_engine: float
    """Tokens a second of a full batch: a stack of processes over both towers in one process."""
    batch_gain: float
    """Tokens a second of the engine: a full batch over one request."""
    bytes_a_block: int
    """Bytes sent to a worker after each block of 16 tokens at the published model's size."""
    speedup: float
    """Tokens a second on the built-in problems, one at a time: diffusion over AR."""
    retention: float
    """Share of problems solved: diffusion over AR."""


@dataclass(frozen=True, slots=True)
class Record:
    """The results of one run."""

    date: datetime
    """UTC."""
    commit: str | None
    machine: Machine
    settings: dict[str, Any]
    ratios: Ratios

    def as_json(self) -> dict[str, Any]:
        """The record as JSON, in the form that `from_json` reads."""
        return {
            "schema": SCHEMA,
            "date": self.date.isoformat(timespec="seconds"),
            "commit": self.commit,
            "machine": dataclasses.asdict(self.machine),
            "settings": self.settings,
            "ratios": {name: round(value, 4) for name, value in dataclasses.asdict(self.ratios).items()},
        }

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> Record:
        """A record from JSON. Raises ConfigError, naming a field that is missing or wrong."""
        try:
            if raw["schema"] != SCHEMA:
                raise ConfigError(f"schema: must be {SCHEMA}, not {raw['schema']!r}")
            date = datetime.fromisoformat(raw["date"])
            return cls(date, raw["commit"], Machine(**raw["machine"]), raw["settings"], Ratios(**raw["ratios"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"not a record of a benchmark: {error}") from None

    @property
    def file_name(self) -> str:
        """The record's file name, which sorts by date."""
        return f"{self.date:%Y%m%dT%H%M%SZ}-{(self.commit or 'unknown').rstrip('+')}.json"


@dataclass(frozen=True, slots=True)
class RecordConfig:
    """The extent of a measurement."""

    checkpoint: Path
    """A checkpoint with random weights, big enough that its time goes into computing; for all but speed-up and retention."""
    trained: Path
    """A checkpoint that solves the built-in problems; for speed-up and retention."""
    threads: int
    """CPU threads of the engine."""
    batch: int = 16
    """Requests at a time in a full batch."""
    rounds: int = 3
    """Requests for each place in the batch."""
    repeats: int = 3
    """How many times the two sides of a ratio are measured."""
    max_tokens: int = 64
    """Tokens of each request."""
    problems: int = 100
    seed: int = 13
    """The seed of the problems."""
    kernels: str = "auto"
    device: str = "auto"

    def __post_init__(self) -> None:
        for name, least in (("threads", 1), ("batch", 2), ("rounds", 1), ("repeats", 1), ("max_tokens", 1), ("problems", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name}: must be at least {least}, not {getattr(self, name)}")


def measure_record(config: RecordConfig, say: Say) -> Record:
    """Measure all ratios, which takes minutes. Raises TwoTowerError."""
    commit = this_commit()  # read first, since the checkout may change meanwhile
    engine_over_plain, batch_gain = _engine(config, say)
    services_over_engine = asyncio.run(_services(config, say))
    speedup, retention = _quality(config, say)
    ratios = Ratios(engine_over_plain, services_over_engine, batch_gain, delta_bytes(), speedup, retention)
    settings = {name: value for name, value in dataclasses.asdict(config).items() if not isinstance(value, Path)}
    return Record(datetime.now(UTC), commit, this_machine(), settings, ratios)


def write_record(record: Record, directory: Path) -> Path:
    """Write a record into a directory, which is created if needed; returns the file."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / record.file_name
    path.write_text(json.dumps(record.as_json(), indent=2) + "\n", encoding="utf-8")
    return path


def _engine(config: RecordConfig, say: Say) -> tuple[float, float]:
    """Ratios of the engine over the plain way, and of a full batch over one request."""
    engine, workload = _open(config)
    plain = plain_engine(config.checkpoint, dtype="auto", device=config.device, threads=config.threads)
    over_plain, gain = [], []
    for i in range(config.repeats):
        slow = run_plain(plain, workload, 1).tokens_per_s
        one = run_batch(engine, workload, config.rounds, 1).tokens_per_s
        full = run_batch(engine, workload, config.rounds * config.batch, config.batch).tokens_per_s
        over_plain.append(one / slow)
        gain.append(full / one)
        say(
            f"[bench] {i + 1}/{config.repeats}: plain {slow:,.1f}, engine {one:,.1f}, batch {config.batch} {full:,.1f} tokens/s"
        )
    return statistics.median(over_plain), statistics.median(gain)


async def _services(config: RecordConfig, say: Say) -> float:
    """The ratio of a stack over the engine, both with a full batch."""
    up = on_free_ports(
        config.checkpoint,
        kernels=config.kernels,
        device=config.device,
        slots=config.batch,
        max_sessions=max(64, config.batch),
        unhealthy_after_s=0,  # so that checks do not disturb the measurement
    )
    thread = EngineThread("bench-engine", config.threads)
    try:
        engine, workload = await thread.run(_open, config)
        requests, ratios = config.rounds * config.batch, []
        async with stack(up, say) as running:
            for i in range(config.repeats):
                alone = (await thread.run(run_batch, engine, workload, requests, config.batch)).tokens_per_s
                served = (await closed_loop(running.grpc_address, workload, requests, config.batch)).tokens_per_s
                ratios.append(served / alone)
                say(f"[bench] {i + 1}/{config.repeats}: engine {alone:,.1f}, services {served:,.1f} tokens/s")
        return statistics.median(ratios)
    finally:
        thread.close()


def _quality(config: RecordConfig, say: Say) -> tuple[float, float]:
    """Speed-up and retention of diffusion over AR."""
    evaluation = Evaluation(
        EvalConfig(
            config.trained,
            seed=config.seed,
            problems=config.problems,
            device=config.device,
            kernels=config.kernels,
            threads=1,  # at this model's size, a second thread gains nothing
            compiled=False,
        )
    )
    compared = evaluation.compare(1)
    say(f"[bench] {config.problems} problems: speed-up {compared.speedup:.2f}x, retention {compared.retention:.1%}")
    return compared.speedup, compared.retention


def _open(config: RecordConfig) -> tuple[LocalEngine, Workload]:
    engine = open_engine(config.checkpoint, dtype="auto", device=config.device, threads=config.threads, kernels=config.kernels)
    return engine, Workload(engine.limits.vocab_size, max_tokens=config.max_tokens, block_size=engine.limits.block_size)
