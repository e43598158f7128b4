"""Runs a set of vectors: in this process, or through a gateway."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from twotower.client.grpc_client import GatewayClient
from twotower.conformance.vectors import Case, load_cases
from twotower.errors import TwoTowerError
from twotower.events import Block
from twotower.request import Mode

Report = Callable[[str], None]
"""Takes one line about one miss."""


@dataclass(frozen=True, slots=True)
class Tally:
    """What passed, of what was run."""

    cases_passed: int = 0
    cases: int = 0
    states_passed: int = 0
    states: int = 0
    skipped: int = 0
    """Cases that cannot be run this way."""

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            self.cases_passed + other.cases_passed,
            self.cases + other.cases,
            self.states_passed + other.states_passed,
            self.states + other.states,
            self.skipped + other.skipped,
        )

    def __str__(self) -> str:
        return f"{self.cases_passed}/{self.cases} cases, {self.states_passed}/{self.states} states"

    @property
    def perfect(self) -> bool:
        """Nothing missed, and something was run."""
        return self.cases > 0 and (self.cases_passed, self.states_passed) == (self.cases, self.states)


def run_local(directory: Path, report: Report, kernels: str = "auto") -> Tally:
    """All cases and states, in fp32, in this process."""
    from twotower.conformance.states import TOLERANCE, state_differences
    from twotower.engine.local import LocalEngine

    cases = load_cases(directory)
    engine = LocalEngine(directory, dtype="float32", kernels=kernels)
    passed = 0
    for case in cases:
        result = engine.generate(case.prompt, case.params)
        passed += _judge(directory, case, result.token_ids, result.forwards, report)
    states = states_passed = 0
    for name, difference in state_differences(engine, directory):
        states += 1
        if difference <= TOLERANCE:
            states_passed += 1
        else:
            report(f"{directory}: {name} differs by {difference:.2e}, more than {TOLERANCE}")
    return Tally(passed, len(cases), states_passed, states)


async def run_target(directory: Path, target: str, concurrency: int, report: Report) -> Tally:
    """All cases but mock-AR, which exists only in one process, `concurrency` at a time through the gateway at `target`."""
    everything = load_cases(directory)
    cases = [case for case in everything if case.params.mode is not Mode.MOCK_AR]
    slots = asyncio.Semaphore(concurrency)
    async with GatewayClient(target) as client:

        async def run(case: Case) -> bool:
            async with slots:
                try:
                    token_ids, forwards = await _complete(client, case)
                except TwoTowerError as error:
                    report(f"{directory}: {case.name}: {error}")
                    return False
            return _judge(directory, case, token_ids, forwards, report)

        passed = await asyncio.gather(*(run(case) for case in cases))
    return Tally(sum(passed), len(cases), skipped=len(everything) - len(cases))


async def _complete(client: GatewayClient, case: Case) -> tuple[list[int], int]:
    """Tokens and forwards of a case, through a gateway."""
    params = case.params
    token_ids: list[int] = []
    forwards = 0
    async for event in client.generate(
        case.prompt,
        mode=params.mode,
        max_tokens=params.max_tokens,
        block_size=params.block_size,
        steps=params.steps,
        gamma=params.gamma,
        temperature=params.temperature,
        seed=params.seed,
        ignore_eos=not params.eos_token_ids,
        eos_token_ids=params.eos_token_ids,
    ):
        if isinstance(event, Block):
            token_ids += event.token_ids
            forwards += event.forwards
    return token_ids, forwards


def _judge(directory: Path, case: Case, token_ids: list[int], forwards: int, report: Report) -> bool:
    differences = case.differences(token_ids, forwards)
    if differences:
        report(f"{directory}: {case.name}: {', '.join(differences)}")
    return not differences
