"""What became of all requests: counted by kind and reason, and told in a few lines."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field

from tests.faults.asks import Answer, Ask

BLOCK = 16
SHOWN = 3
"""Different texts that are shown whole."""


@dataclass(slots=True)
class Tally:
    """Counts of one phase."""

    equal: int = 0
    """Answers with the tokens and the text of the calm."""
    left: int = 0
    """Requests whose client left."""
    different: Counter[str] = field(default_factory=Counter)
    """Answers with others, by how they differ."""
    failed: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    """Refusals that a client was told to try again after, and did."""
    examples: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    """How long each answer took; told, and not judged."""

    @property
    def compared(self) -> int:
        """Answers that were compared."""
        return self.equal + self.different.total()

    def answer(self, ask: Ask, got: Answer, calm: Answer) -> None:
        """Count an answer."""
        if got == calm:
            self.equal += 1
            return
        how = _difference(got, calm)
        self.different[how] += 1
        if len(self.examples) < SHOWN:
            settings = ", ".join(f"{key}={value}" for key, value in ask.settings.items())
            self.examples.append(f"... {ask.prompt[-120:]!r} ({settings})\n    got   {got.text!r}\n    calm  {calm.text!r}")

    def lines(self, phase: str) -> list[str]:
        """The counts in words."""
        said = [
            f"{phase}: {self.compared} compared, {self.equal} equal, {self.different.total()} different, "
            f"{self.failed.total()} failed, {self.left} left early, {self.refused.total()} refusals"
        ]
        if took := sorted(self.seconds):
            said.append(
                f"  seconds: median {took[len(took) // 2]:.1f}, 99 % {took[len(took) * 99 // 100]:.1f}, most {took[-1]:.1f}"
            )
        for kind, reasons in (("different", self.different), ("failed", self.failed), ("refused", self.refused)):
            said += [f"  {kind} {count}: {reason}" for reason, count in reasons.most_common(8)]
        return said + [f"  different: {example}" for example in self.examples]


def reason_of(text: str) -> str:
    """A reason without what differs from request to request."""
    text = re.sub(r"\d+\.\d+\.\d+\.\d+:\d+", "ADDRESS", text)
    text = re.sub(r"\b[0-9a-f]{32}\b", "ID", text)
    return re.sub(r"\d+", "N", text)[:200]


def _difference(got: Answer, calm: Answer) -> str:
    if got.tokens == calm.tokens:
        return "the same tokens, another text"
    ours, theirs = got.tokens, calm.tokens
    if ours == theirs[: len(ours)]:
        return "it ends too early"
    for at in range(0, len(ours), BLOCK):
        if ours[:at] + ours[at + BLOCK :] == theirs and ours[at : at + BLOCK] == ours[at - BLOCK : at]:
            return "a block is repeated"
    for at in range(0, len(theirs), BLOCK):
        if ours == theirs[:at] + theirs[at + BLOCK :]:
            return "a block is missing"
    return "other tokens"
