"""Order of work in the context tower: commits first, then AR tokens, then prompt chunks within a token budget.

Pure: knows no torch, no time and no threads.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar


class Schedulable(Protocol):
    """What a plan must know of a session."""

    @property
    def over(self) -> bool:
        """Nobody waits for it any more."""
        ...

    @property
    def position(self) -> int:
        """Tokens that its state holds."""
        ...

    @property
    def prefill_left(self) -> int:
        """Prompt tokens to read; 0 also while it must not be read."""
        ...

    @property
    def block(self) -> Sequence[int] | None:
        """The next written block that its state does not hold."""
        ...

    @property
    def decodes(self) -> bool:
        """It wants its next AR token."""
        ...

    @property
    def alone(self) -> bool:
        """It shares no forward over prompts or AR tokens, since one that it was in has failed."""
        ...


S = TypeVar("S", bound=Schedulable)


@dataclass(slots=True)
class Plan(Generic[S]):
    """The work of one iteration: a forward of each kind, at most."""

    commits: list[S] = field(default_factory=list)
    decodes: list[S] = field(default_factory=list)
    chunks: list[tuple[S, int]] = field(default_factory=list)
    """With the number of prompt tokens to read."""
    prompts: int = 0
    """Sessions with prompts to read, in this iteration or a later one."""

    def __bool__(self) -> bool:
        return bool(self.commits or self.decodes or self.chunks)


def plan(sessions: Iterable[S], *, budget: int, chunk: int) -> Plan[S]:
    """The next iteration, over sessions in the order of their arrival.

    A worker waits for its commit and an AR client for its token, so that all of these are taken (of tokens, those of the
    first session alone, if it must be alone); prompts share what is left of the `budget` of tokens, at least one chunk.
    Chunks end at multiples of `chunk`, wherever a prompt's reading began: its state has the same bits however its chunks
    fall into iterations.
    """
    out: Plan[S] = Plan()
    read: list[S] = []
    room = budget
    for session in sessions:
        if session.over:
            continue
        if session.prefill_left:
            read.append(session)
        elif (block := session.block) is not None:
            out.commits.append(session)
            room -= len(block)
        elif session.decodes and not (out.decodes and (session.alone or out.decodes[0].alone)):
            out.decodes.append(session)
            room -= 1
    out.prompts = len(read)
    for session in read:
        if out.chunks and (room <= 0 or session.alone):
            continue
        tokens = min(chunk - session.position % chunk, session.prefill_left)
        out.chunks.append((session, tokens))
        room -= tokens
        if session.alone:
            break
    return out
