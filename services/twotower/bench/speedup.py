"""From step times to the speed of text: one context and one denoiser against AR on one of the two devices."""

from __future__ import annotations

from dataclasses import dataclass

TOKENS_PER_FORWARD = (1.35, 3.0, 5.0)
PUBLISHED = 2.42
"""The published speedup over AR, for comparison."""


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Seconds of one step over a batch, with each tower on its own device."""

    batch: int
    context: int
    block: int
    denoiser: float
    commit: float
    ar: float

    @property
    def ar_tokens_per_s(self) -> float:
        """Tokens a second of the context tower alone."""
        return self.batch / self.ar

    def one_batch(self, per_forward: float) -> float:
        """Tokens a second if the denoiser waits while its blocks are committed."""
        return self.batch * self.block / (self.block / per_forward * self.denoiser + self.commit)

    def two_batches(self, per_forward: float) -> float:
        """Tokens a second with twice the sessions: half are refined while the others are committed, so neither tower waits."""
        return self.batch * self.block / max(self.block / per_forward * self.denoiser, self.commit)

    def needed(self, speedup: float = PUBLISHED) -> float | None:
        """Tokens a forward at which one batch is `speedup` times as fast as AR; None if the commit alone takes too long."""
        left = self.block * self.ar / speedup - self.commit
        return self.block * self.denoiser / left if left > 0 else None


def speedup_table(times: list[StepTimes]) -> list[str]:
    """A Markdown table, a row for each batch and context."""
    head = "".join(f" {r:g}: tokens/s | x AR | two batches |" for r in TOKENS_PER_FORWARD)
    lines = [
        f"| batch | context | AR tokens/s |{head} tokens/forward for {PUBLISHED}x |",
        "|" + "---|" * (4 + 3 * len(TOKENS_PER_FORWARD)),
    ]
    for t in times:
        cells = ""
        for r in TOKENS_PER_FORWARD:
            once, twice = t.one_batch(r), t.two_batches(r) / t.ar_tokens_per_s
            cells += f" {once:,.1f} | {once / t.ar_tokens_per_s:.2f} | {twice:.2f} |"
        needed = t.needed()
        needed_cell = "never" if needed is None or needed > t.block else f"{needed:.2f}"
        lines.append(f"| {t.batch} | {t.context:,} | {t.ar_tokens_per_s:,.1f} |{cells} {needed_cell} |")
    return lines
