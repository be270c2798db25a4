"""The progress of a run on stderr: a line for each block above a live view on a terminal.

Elsewhere, as in the log of a job, there is a line for each tenth of the blocks, or of the bytes of
a long step.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING

from gptq_cli.cli.console import Console, log, on_one_line, unread_line, visible
from gptq_cli.errors import clock, counted, size, without_secrets
from gptq_cli.events import (
    BlockFinished,
    BlockStarted,
    EngineSaid,
    Event,
    LayerReport,
    LayerSolved,
    LayerStarted,
    Noted,
    PhaseStarted,
    Resumed,
    RunPlanned,
    StepsDone,
    Warned,
    WorkKept,
)
from gptq_cli.files import BytesDone
from gptq_cli.storage.work_directory import resume_command

if TYPE_CHECKING:
    from rich.live import Live
    from rich.text import Text

SILENCE = 60.0  # seconds after which a log without a new line looks dead
BAR = 24
TENTHS = 10  # lines about blocks in a log
APART = 1.0  # seconds between two lines about bytes, so that a short step has none
LASTING = ("device", "text", "resume")  # phases that stay on a terminal
ONCE = ("device", "calibration", "text", "source")  # phases that parts of a command repeat
WITH_BARS = ("upload",)  # phases in which the client of the Hub draws bars of its own


class _Step:
    """A phase, and how many of its bytes or steps are done; "" in words if none are counted."""

    def __init__(self, name: str, began: float) -> None:
        self.name, self.began, self.spoke = name, began, began
        self.tenths = 0
        self.state = ""
        self.count: BytesDone | StepsDone = BytesDone(0, 1)

    def advance(self, event: BytesDone | StepsDone, now: float) -> bool:
        """Note the count; return whether a log gets a line: a tenth is done, the last is old."""
        done_now = event.done
        whole = size(event.total)
        if isinstance(event, StepsDone):
            done_now -= event.before
            whole = counted(event.total, "step")
        left = (now - self.began) * (event.total - event.done) / done_now
        percent = int(100 * event.done / event.total)
        self.count = event
        self.state = f"{percent} % of {whole}, {clock(left)} left"
        tenths = int(TENTHS * event.done / event.total)
        if tenths == self.tenths or now - self.spoke < APART:
            return False
        self.tenths, self.spoke = tenths, now
        return True


class Progress:
    """A receiver of events that shows them; a context manager, because it removes its live view."""

    def __init__(self, console: Console, now: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._now = now
        self._last_line = now()
        self._block: BlockStarted | None = None
        self._done = 0  # finished blocks, with those of an earlier call
        self._layer = ""
        self._step = _Step("", 0.0)
        self._solved: list[LayerReport] = []
        self._seconds: list[float] = []
        self._memory = ""
        self._live: Live | None = None

    def __enter__(self) -> Progress:
        is_terminal = sys.stderr is not None and sys.stderr.isatty()
        if is_terminal and os.environ.get("TERM") != "dumb" and not self._console.quiet:
            self._live = _live_view()
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end_live()

    def _end_live(self) -> None:
        if self._live:
            self._live.stop()
            self._live = None

    def __call__(self, event: Event) -> None:
        self._remember(event)
        match event:
            case Warned():
                self._console.warn(event.code, event.message)
                return
            case Noted():
                self._console.show_notes([event.text])
                return
            case Resumed() | WorkKept() | EngineSaid():
                self._console.advise(_advice(event))
                return
            case LayerSolved():
                self._console.detail(_detail(event.report))
            case RunPlanned():
                self._say_unread(event)
        self._show(event, self._line(event))

    def _show(self, event: Event, line: str | None) -> None:
        """Write the line for an event, or keep it for the log file if it says little."""
        if self._live:
            self._live.update(_cropped(self._view()), refresh=isinstance(event, BlockFinished))
        if line is None:
            return
        hidden = self._is_between(event)
        if self._live:
            hidden = not self._lasts(event)
        if hidden or self._is_repeated(event, line):
            log.write(on_one_line(line))
            return
        self._last_line = self._now()
        self._console.say(line)

    def _is_repeated(self, event: Event, line: str) -> bool:
        """Return whether an earlier part of the command has said the same about its beginning."""
        if not isinstance(event, PhaseStarted) or event.name not in ONCE:
            return False
        return not self._console.is_new(line)

    def _lasts(self, event: Event) -> bool:
        """Return whether the line for an event stays above the live view, which shows the rest."""
        match event:
            case PhaseStarted():
                return event.name in LASTING
            case BlockFinished():  # of an evaluation it has no errors
                return bool(self._solved)
            case BytesDone() | StepsDone():
                return False
        return True

    def _is_between(self, event: Event) -> bool:
        """Return whether an event ends a block that is no tenth, soon after the last line."""
        if not isinstance(event, BlockFinished) or self._now() - self._last_line > SILENCE:
            return False
        before, now = TENTHS * event.index, TENTHS * (event.index + 1)
        return before // event.n_blocks == now // event.n_blocks

    def _say_unread(self, event: RunPlanned) -> None:
        """Name the engines that will not load the output, unless the user chose one as target.

        They are not named again if a goal has made them known already.
        """
        unread = unread_line(event.engines)
        if unread is not None and event.target is None and self._console.is_new(unread):
            self._console.say(f"note: the output {unread}")

    def _remember(self, event: Event) -> None:
        match event:
            case PhaseStarted():
                self._begin(event)
            case BlockStarted():
                self._block, self._done = event, event.index
                self._step = _Step("", 0.0)
                self._layer, self._solved = event.name, []
            case LayerStarted():
                self._layer = event.name
            case LayerSolved():
                self._solved.append(event.report)
                self._layer = f"{event.report.name}  error {_errors([event.report])}"
            case BlockFinished():
                self._seconds.append(event.seconds)
                self._done = event.index + 1
                self._memory = _memory(event)

    def _begin(self, event: PhaseStarted) -> None:
        """Begin a phase, without the live view if it has bars of its own."""
        self._block, self._seconds = None, []
        self._layer = f"{event.name}: {event.detail}"
        self._step = _Step(event.name, self._now())
        if event.name in WITH_BARS:
            self._end_live()

    def _line(self, event: Event) -> str | None:
        """Return the line for an event in a plain log, or None if it gets none."""
        match event:
            case RunPlanned():
                return _planned(event)
            case PhaseStarted():
                return self._layer
            case BytesDone() | StepsDone() if self._step.advance(event, self._now()):
                return f"{self._step.name}: {self._step.state}"
            case BlockFinished():
                return self._finished_line(event)
            case LayerSolved() if self._block and self._now() - self._last_line > SILENCE:
                where = f"block {self._block.index + 1}/{self._block.n_blocks}"
                return f"{where} {event.report.name} error {_errors([event.report])}"
        return None

    def _finished_line(self, event: BlockFinished) -> str:
        block = f"block {event.index + 1}/{event.n_blocks} {event.name}"
        if self._solved:
            block += f" error {_errors(self._solved)}"
        eta = self._eta(event.index + 1, event.n_blocks)
        return f"{block} {event.seconds:.1f} s eta {eta} mem {self._memory}"

    def _eta(self, done: int, n_blocks: int) -> str:
        if not self._seconds:
            return "?"
        mean = sum(self._seconds) / len(self._seconds)
        return clock(mean * (n_blocks - done))

    def _view(self) -> str:
        """Return the live view: three short lines about progress, current layer and memory."""
        layer = on_one_line(self._layer)
        if self._step.state:
            done, total = self._step.count.done, self._step.count.total
            return self._bar(self._step.name, done, total, self._step.state) + f"\n{layer}"
        if self._block is None:
            return layer
        n_blocks = self._block.n_blocks
        where, left = f"block {self._block.index + 1}/{n_blocks}", self._eta(self._done, n_blocks)
        lines = [self._bar(where, self._done, n_blocks, f"{left} left"), layer]
        if self._memory:
            lines.append(f"memory {self._memory}")
        return "\n".join(lines)

    def _bar(self, start: str, done: float, total: int, end: str) -> str:
        """Return a line with a bar, which is shorter on a terminal with few columns."""
        cells = BAR
        if self._live:
            cells = min(BAR, self._live.console.width - len(f"{start}  {end}"))
        if cells <= 0:
            return f"{start} {end}"
        bar = ("█" * int(cells * done / total)).ljust(cells, "░")
        return f"{start} {bar} {end}"


def _live_view() -> Live:
    from rich.console import Console as RichConsole
    from rich.live import Live

    terminal = RichConsole(stderr=True, markup=False, highlight=False, soft_wrap=True)
    return Live(console=terminal, transient=True, refresh_per_second=4)


def _cropped(view: str) -> Text:
    from rich.text import Text

    return Text(visible(without_secrets(view)), no_wrap=True, overflow="ellipsis")


def _advice(event: Resumed | WorkKept | EngineSaid) -> str:
    if isinstance(event, EngineSaid):
        return f"{event.engine}: {event.line}"
    if isinstance(event, Resumed):
        blocks = counted(event.n_blocks, "block")
        return f"resuming after {event.index} of {blocks}, from {event.directory}"
    what = "finished blocks are" if event.blocks else "finished work is"
    if event.failed:
        until = "until a run with other settings begins"
        return f"{what} kept in {event.directory} {until}"
    return f"{what} kept; resume with: {resume_command(event.directory)}"


def _planned(event: RunPlanned) -> str:
    kept = f", {event.n_kept} kept" if event.n_kept else ""
    sizes = f"{size(event.bytes_before)} -> {size(event.bytes_after)}"
    rate = f"{event.bits_per_weight:.3g} bits a weight"
    layers, blocks = counted(event.n_quantized, "layer"), counted(event.n_blocks, "block")
    return f"plan: {layers} in {blocks}{kept}, {sizes}, {rate}"


def _detail(report: LayerReport) -> str:
    settings = f"{report.bits} bit group_size {report.group_size} damp {report.damp_percent:g}"
    error = f"error {_errors([report])}"
    if report.asymmetric_calibration is not None:
        settings += f" follows {report.asymmetric_calibration:.2f}"
    if report.loss_ratio is not None:
        settings += f" loss x{report.loss_ratio:.2f}"
    return f"layer {report.name} {error} {settings} tokens {report.tokens} {report.seconds:.2f} s"


def _errors(reports: list[LayerReport]) -> str:
    """Return the mean output error of some layers, and that of round-to-nearest."""
    mine = math.fsum(report.relative_error for report in reports) / len(reports)
    rtn = math.fsum(report.rtn_relative_error for report in reports) / len(reports)
    return f"{mine:.1e} (rtn {rtn:.1e})"


def _memory(event: BlockFinished) -> str:
    device = f" device {size(event.device_bytes)}" if event.device_bytes else ""
    return f"{size(event.host_bytes)}{device}"
