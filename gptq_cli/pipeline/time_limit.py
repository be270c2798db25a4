"""A run that has so much time and no more."""

from __future__ import annotations

import re
import time
from collections.abc import Callable

from gptq_cli.errors import ConfigError, PausedError
from gptq_cli.pipeline.events import BlockFinished, BlockStarted, Event, LayerStarted, Report


class TimeLimit:
    """Passes events on, and ends the run with PausedError E_PAUSED before a block that would not end in time.

    The longest block so far tells how long the next one takes. A block that takes longer than that is given up between
    two layers when `seconds` from now are over.
    """

    def __init__(self, report: Report, seconds: float, now: Callable[[], float] = time.monotonic) -> None:
        self._report, self._now = report, now
        self._seconds, self._end = seconds, now() + seconds
        self._longest = 0.0

    def __call__(self, event: Event) -> None:
        self._report(event)
        if isinstance(event, BlockFinished):
            self._longest = max(self._longest, event.seconds)
        needed = self._longest if isinstance(event, BlockStarted) else 0.0
        if isinstance(event, BlockStarted | LayerStarted) and self._now() + needed > self._end:
            raise PausedError(
                "E_PAUSED", f"the {self._seconds:g} s of --max-runtime do not suffice for what is left",
                hint="run the same command again to go on; a block that was begun is done again",
            )  # fmt: skip


def seconds(duration: str | None) -> float | None:
    """Seconds of "3h30m", "90m" or "45s"; ConfigError E_CFG_RANGE for anything else."""
    if duration is None:
        return None
    match = re.fullmatch(r"(?=.)(?:(\d{1,6})h)?(?:(\d{1,6})m)?(?:(\d{1,6})s)?", duration)
    found = sum(unit * int(part or 0) for unit, part in zip((3600, 60, 1), match.groups(), strict=True)) if match else 0
    if not found:
        message = f"--max-runtime must be a time such as 3h30m, 90m or 45s, got {duration!r}"
        raise ConfigError("E_CFG_RANGE", message, hint="say hours with h, minutes with m, seconds with s")
    return found
