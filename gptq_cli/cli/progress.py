"""A run as it goes: a live view on a terminal, a plain line per block everywhere else, both on stderr."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING

from gptq_cli.cli.console import Console, log, on_one_line, unread_line, visible
from gptq_cli.config.finding import clock, size
from gptq_cli.errors import without_secrets
from gptq_cli.events import (
    BlockFinished,
    BlockStarted,
    Event,
    LayerReport,
    LayerSolved,
    LayerStarted,
    PhaseStarted,
    Resumed,
    RunPlanned,
    Warned,
    WorkKept,
)
from gptq_cli.storage.work_directory import resume_command

if TYPE_CHECKING:
    from rich.live import Live
    from rich.text import Text

SILENCE = 60.0  # seconds after which a log without a new line looks dead
BAR = 24


class Progress:
    """Takes the events of a run and shows them; a context manager, since a live view must be put away."""

    def __init__(self, console: Console, now: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._now = now
        self._last_line = now()
        self._block: BlockStarted | None = None
        self._done = 0  # blocks, those that an earlier call has finished included
        self._layer = ""
        self._solved: list[LayerReport] = []
        self._seconds: list[float] = []
        self._memory = ""
        self._live: Live | None = None

    def __enter__(self) -> Progress:
        terminal = (
            sys.stderr is not None and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
        )
        if terminal and not self._console.quiet:
            self._live = _live_view()
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live:
            self._live.stop()
            self._live = None

    def __call__(self, event: Event) -> None:
        self._note(event)
        if isinstance(event, LayerSolved):
            self._console.detail(_detail(event.report))
        if (
            isinstance(event, RunPlanned)
            and event.target is None
            and (line := unread_line(event.engines))
        ):
            self._console.say(f"note: the output {line}")
        if isinstance(event, Warned):
            self._console.warn(event.code, event.message)
        elif isinstance(event, Resumed | WorkKept):
            self._console.advise(_about_work(event))
        elif self._live:
            self._live.update(_cropped(self._view()), refresh=isinstance(event, BlockFinished))
            log.write(on_one_line(self._line(event) or ""))
        elif line := self._line(event):
            self._last_line = self._now()
            self._console.say(line)

    def _note(self, event: Event) -> None:
        match event:
            case PhaseStarted():
                self._block, self._seconds, self._layer = None, [], f"{event.name}: {event.detail}"
            case BlockStarted():
                self._block, self._done, self._layer, self._solved = (
                    event,
                    event.index,
                    event.name,
                    [],
                )
            case LayerStarted():
                self._layer = event.name
            case LayerSolved():
                self._solved.append(event.report)
                self._layer = f"{event.report.name}  error {_errors([event.report])}"
            case BlockFinished():
                self._seconds.append(event.seconds)
                self._done = event.index + 1
                self._memory = _memory(event)

    def _line(self, event: Event) -> str | None:
        match event:
            case RunPlanned():
                return _planned(event)
            case PhaseStarted():
                return self._layer
            case BlockFinished():
                errors = f" error {_errors(self._solved)}" if self._solved else ""
                time_left = (
                    f"{event.seconds:.1f} s eta {self._eta(event.index + 1, event.n_blocks)}"
                )
                return f"block {event.index + 1}/{event.n_blocks} {event.name}{errors} {time_left} mem {self._memory}"
            case LayerSolved() if self._block and self._now() - self._last_line > SILENCE:
                where = f"block {self._block.index + 1}/{self._block.n_blocks}"
                return f"{where} {event.report.name} error {_errors([event.report])}"
        return None

    def _eta(self, done: int, n_blocks: int) -> str:
        return (
            clock(sum(self._seconds) / len(self._seconds) * (n_blocks - done))
            if self._seconds
            else "?"
        )

    def _view(self) -> str:
        """Three short lines: how far, what now, how much memory."""
        if self._block is None:
            return on_one_line(self._layer)
        n_blocks = self._block.n_blocks
        bar = ("█" * (BAR * self._done // n_blocks)).ljust(BAR, "░")
        lines = [
            f"block {self._block.index + 1}/{n_blocks} {bar} {self._eta(self._done, n_blocks)} left"
        ]
        lines += [on_one_line(self._layer), *([f"memory {self._memory}"] if self._memory else [])]
        return "\n".join(lines)


def _live_view() -> Live:
    from rich.console import Console as RichConsole
    from rich.live import Live

    terminal = RichConsole(stderr=True, markup=False, highlight=False, soft_wrap=True)
    return Live(console=terminal, transient=True, refresh_per_second=4)


def _cropped(view: str) -> Text:
    from rich.text import Text

    return Text(visible(without_secrets(view)), no_wrap=True, overflow="ellipsis")


def _about_work(event: Resumed | WorkKept) -> str:
    if isinstance(event, Resumed):
        return f"resuming after {event.index} of {event.n_blocks} blocks, from {event.directory}"
    if event.failed:
        return (
            f"finished blocks are kept in {event.directory} until a run with other settings begins"
        )
    return f"finished blocks are kept; go on with: {resume_command(event.directory)}"


def _planned(event: RunPlanned) -> str:
    kept = f", {event.n_kept} kept" if event.n_kept else ""
    sizes = f"{size(event.bytes_before)} -> {size(event.bytes_after)}"
    rate = f"{event.bits_per_weight:.3g} bits a weight"
    return f"plan: {event.n_quantized} layers in {event.n_blocks} blocks{kept}, {sizes}, {rate}"


def _detail(report: LayerReport) -> str:
    how = f"{report.bits} bit group_size {report.group_size} damp {report.damp_percent:g} tokens {report.tokens}"
    return f"layer {report.name} error {_errors([report])} {how} {report.seconds:.2f} s"


def _errors(reports: list[LayerReport]) -> str:
    """Mean relative error of some layers, against round-to-nearest on the same grid."""
    mine = math.fsum(report.relative_error for report in reports) / len(reports)
    rtn = math.fsum(report.rtn_relative_error for report in reports) / len(reports)
    return f"{mine:.1e} (rtn {rtn:.1e})"


def _memory(event: BlockFinished) -> str:
    device = f" device {size(event.device_bytes)}" if event.device_bytes else ""
    return f"{size(event.host_bytes)}{device}"
