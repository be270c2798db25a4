"""When to save: after every block, unless saving would take more than a twentieth of the time."""

from __future__ import annotations

import time
from collections.abc import Callable

MOST_SHARE = 1 / 20  # of the time of a run
BYTES_PER_SECOND = 1e9  # of hidden states that are hashed and written; assumed


class SavingTimes:
    """Tells whether work has gone on for long enough since something was saved last, or since the start.

    With `always` it has after every block.
    """

    def __init__(self, *, always: bool = False, now: Callable[[], float] = time.monotonic) -> None:
        self.always, self._now, self._last = always, now, now()

    def is_due(self, nbytes: int) -> bool:
        """Whether to save so many bytes now."""
        return self.always or self._now() - self._last >= nbytes / BYTES_PER_SECOND / MOST_SHARE

    def saved(self) -> None:
        """From now on it is counted."""
        self._last = self._now()
