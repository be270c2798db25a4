"""A run that has so much time and no more."""

from __future__ import annotations

import time
from collections.abc import Callable

from gptq_cli.errors import PausedError
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
