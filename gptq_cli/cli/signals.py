"""Signals that ask a run to end: the first ends it in order, the second at once."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from gptq_cli.cli.console import Console
from gptq_cli.errors import Stopped

# Ctrl-C, `kill` and schedulers, a terminal that closes, a limit of CPU time, Slurm's --signal
NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGXCPU", "SIGUSR1")
SHOW_CURSOR = "\x1b[?25h"
Handler = Callable[[int, FrameType | None], None]


@contextmanager
def handled(handler: Handler) -> Iterator[list[int]]:
    """Let `handler` take these signals in the body, whose numbers it is given; ignored ones (nohup) stay so."""
    wanted = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in wanted}
    taken = [number for number in wanted if before[number] is not signal.SIG_IGN]
    for number in taken:
        signal.signal(number, handler)
    try:
        yield taken
    finally:
        for number in taken:
            signal.signal(number, before[number])


@contextmanager
def stoppable(console: Console) -> Iterator[None]:
    """Raise Stopped in the body when one of these signals comes.

    It is raised wherever the body is, and not only between layers: whatever it interrupts may as well be killed, since
    only what is finished and durable counts.
    """

    def end_at_once(number: int, _frame: FrameType | None) -> None:
        if sys.stderr is not None and sys.stderr.isatty():
            sys.stderr.write(SHOW_CURSOR)
            sys.stderr.flush()
        os._exit(128 + number)

    def end(number: int, _frame: FrameType | None) -> None:
        for other in taken:
            signal.signal(other, end_at_once)
        console.say(f"stopping on {signal.Signals(number).name}; once more to end at once")
        raise Stopped(number)

    with handled(end) as taken:
        yield


def name_of(exit_code: int) -> str:
    """The name of the signal that an exit code of 128 and more stands for."""
    return signal.Signals(exit_code - 128).name
