"""The limits of memory that a user sets, --max-ram and --max-vram, told apart from what is free. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass

from gptq_cli.config.units import size

SLACK_BYTES = (
    128 * 10**6
)  # that a proposed limit leaves for what libraries take later, or a quarter of the estimate
STEP_BYTES = 10**7


@dataclass(frozen=True, slots=True)
class Limit:
    """A limit that leaves less than is free, in bytes; `held` is what the run has taken of it already.

    `sharers` processes share the limit; held and free are of each.
    """

    option: str
    allowed: int
    held: int
    free: int
    sharers: int = 1

    def __str__(self) -> str:
        of_all = f" for {self.sharers} processes" if self.sharers > 1 else ""
        return f"{self.option} allows {size(self.allowed)}{of_all}, the run holds {size(self.held)} already"

    def way_out(self, needed: int) -> str | None:
        """The option that would let a process take `needed` bytes; None if so much is not free."""
        if needed > self.free:
            return None
        wanted = self.sharers * (self.held + min(needed + max(needed // 4, SLACK_BYTES), self.free))
        return f"{self.option} {-(-wanted // STEP_BYTES) * STEP_BYTES // 10**6}MB"
