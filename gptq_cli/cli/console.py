"""The two streams of a command: stdout holds the result and nothing else, stderr the messages.

Text from users and files is never taken as markup. Lines are neither wrapped nor cut, except that
`fitted` wraps results, and `_wrapped` messages, at the width of a terminal.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import sys
import warnings
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from pathlib import Path
from shutil import get_terminal_size
from textwrap import fill, wrap
from time import gmtime, time
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

import typer

from gptq_cli.errors import (
    ConfigError,
    GptqError,
    Location,
    Problem,
    __version__,
    clock,
    counted,
    to_json,
    without_secrets,
)

if TYPE_CHECKING:
    from logging import FileHandler, LogRecord

    from gptq_cli.config.serving import Outcome, Verdict
    from gptq_cli.inspection.summary import Row


SCHEMA = 1
SHOWN = 8  # problems on a terminal
STOPS = ("E_INTERRUPTED", "E_PAUSED")  # ends that the user wanted, which are no errors
LINE_ENDS = re.compile("\r\n|[\n\r\x85\u2028\u2029]")  # those of YAML
CARET_WIDTH = 40  # columns of a long line that are shown on each side of the caret
COLOURS = ("auto", "always", "never")
PAINT = {  # the start of a line, and its colour
    re.compile(r"^error\[\w+\]", re.MULTILINE): "1;31",
    re.compile(r"^warning\[\w+\]", re.MULTILINE): "1;33",
    re.compile(r"^(hint|note|next):", re.MULTILINE): "36",
    re.compile(r"^ +\| +\^$", re.MULTILINE): "31",
}
WRAPPED = re.compile(r"(error|warning)\[\w+\]|(hint|note):")  # the start of a line that is prose
COPIED = re.compile(r"gptq |--\w")  # of a command or an option
LOG_MARK = "log of gptq"
BEGAN = "_GPTQ_BEGAN"  # a variable of `main`: when the command began, in seconds since 1970

ENGINES_WIDTH = 98  # columns, with room for "# " before a line
WORDS: dict[Outcome, str] = {
    "yes": "loads in",
    "limited": "loads with limits in",
    "wrong": "loads WRONGLY in",
    "no": "does not load in",
}


@dataclass(frozen=True, slots=True)
class Console:
    """The output of one command.

    With `as_json` the result is one JSON object; with `quiet` it is as short as is still useful.
    `told` holds warnings and other lines that the parts of a command may repeat.
    """

    as_json: bool = False
    quiet: bool = False
    told: set[str] = field(default_factory=set, compare=False)

    def say(self, line: str) -> None:
        """Write a line of progress or advice on stderr, unless `quiet`."""
        line = on_one_line(line)
        if self.quiet:
            log.write(line)
        else:
            write(sys.stderr, line)

    def say_on_screen(self, line: str) -> None:
        """Write a line for somebody who waits at a terminal, unless `quiet`."""
        if sys.stderr is not None and sys.stderr.isatty():
            self.say(line)

    def show_notes(self, notes: Iterable[str]) -> None:
        """Write the notes about a resolved configuration, unless `quiet`."""
        for note in notes:
            self.say(f"note: {note}")

    def detail(self, line: str) -> None:
        """Write a line into the log file, and with --verbose on stderr too."""
        line = on_one_line(line)
        if log.verbose and not self.quiet:
            write(sys.stderr, line)
        else:
            log.write(line)

    def warn(self, code: str, message: str) -> None:
        """Write a warning on stderr, even if `quiet`, unless it was written before."""
        line = on_one_line(f"warning[{code}]: {message}")
        if self.is_new(line):
            write(sys.stderr, line)

    def is_new(self, line: str) -> bool:
        """Note that `line` is told; return whether it was not told before."""
        is_new = line not in self.told
        self.told.add(line)
        return is_new

    def advise(self, line: str) -> None:
        """Write a line that the user needs in order to continue on stderr, even if `quiet`."""
        write(sys.stderr, on_one_line(line))

    def result(self, data: dict[str, Any], human: str, short: str | Path) -> None:
        """Write the result on stdout: `data` as JSON, `human`, or `short` if quiet.

        A path as `short` is written byte for byte, so that it can be opened. Raise GptqError
        E_STDOUT if stdout cannot be written.
        """
        if self.as_json:
            write_result(as_json_text({"schema": SCHEMA, "status": "ok", **data}))
        elif not self.quiet:
            write_result(human)
        elif isinstance(short, Path):
            write_exactly(str(short), os.fsencode(short))
        else:
            write_result(short)

    def document(self, data: dict[str, Any], text: str) -> None:
        """Write a result that is the content of a file: `text` as UTF-8, or `data` as JSON."""
        if self.as_json:
            self.result(data, text, text)
        else:
            write_exactly(text, text.encode())

    def refused(self, data: dict[str, Any], human: str, short: str, error: GptqError) -> NoReturn:
        """Write a result that failed a check, then `error`, and exit with its exit code.

        As JSON both are one object.
        """
        if self.as_json:
            write_result(as_json_text({**_failure(error.problems, error.exit_code), **data}))
        elif self.quiet:
            write_result(short)
        else:
            write_result(human)
        report_problems(error.problems, error.exit_code, as_json=False)
        raise typer.Exit(error.exit_code)


class Log:
    """The state of --verbose and --log-file for all messages, while a command runs."""

    def __init__(self) -> None:
        self.verbose = False
        self.colour = COLOURS[0]
        # Of several processes only the first one writes messages.
        self.muted = os.environ.get("RANK", "0") != "0"
        self._handler: FileHandler | None = None
        self._failure: OSError | None = None  # the reason why the file could not be written

    def begin(self, *, verbose: bool, log_file: Path | None) -> None:
        """Set --verbose and open the log file; raise ConfigError E_LOG_FILE if that fails."""
        self.verbose = verbose
        if log_file is None or self.muted:
            return
        from logging import FileHandler, Formatter

        try:
            self._handler = FileHandler(log_file, encoding="utf-8")
        except OSError as error:
            message = f"cannot write the log file `{log_file}`: {error.strerror}"
            hint = "choose another place for --log-file"
            raise ConfigError("E_LOG_FILE", message, hint=hint) from None
        formatter = Formatter("%(asctime)s.%(msecs)03dZ %(message)s", "%Y-%m-%dT%H:%M:%S")
        formatter.converter = gmtime
        self._handler.setFormatter(formatter)
        self._handler.handleError = self._note_failure  # type: ignore[method-assign]
        # A later command recognises a log by this first line.
        self.write(f"{LOG_MARK} {__version__}")

    def write(self, text: str) -> None:
        """Write the lines of `text` into the log file, if there is one."""
        if self._handler is not None:
            from logging import INFO, LogRecord

            for line in visible(without_secrets(text)).splitlines():
                self._handler.emit(LogRecord("gptq", INFO, "", 0, line, None, None))
            if self._failure is not None:
                self._give_up()

    def end(self) -> None:
        """Close the log file and reset --verbose."""
        if self._handler is not None:
            with suppress(OSError):  # a failure to write was reported already
                self._handler.close()
        self.verbose, self._handler, self._failure = False, None, None
        self.colour = COLOURS[0]

    def _note_failure(self, record: LogRecord) -> None:
        """Remember why a line could not be written; a log must not change the exit code."""
        del record
        error = sys.exc_info()[1]
        if isinstance(error, OSError):
            self._failure = error

    def _give_up(self) -> None:
        """Stop logging and warn once."""
        handler, error = self._handler, self._failure
        self._handler = self._failure = None
        assert handler is not None
        assert error is not None
        message = f"cannot write the log file `{handler.baseFilename}`: {error.strerror}"
        Console().warn("W_LOG_FILE", f"{message}; nothing more is logged")
        with suppress(OSError):
            handler.close()


log = Log()


def as_json_text(data: dict[str, Any]) -> str:
    """Return `data` as one JSON object on one line of printable ASCII.

    Dataclasses are allowed in `data`, see `to_json`. Floats that are not finite become null.
    """
    return json.dumps(_finite(to_json(data)), allow_nan=False).replace("\x7f", "\\u007f")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def report_problems(problems: Sequence[Problem], exit_code: int, *, as_json: bool) -> None:
    """Write the problems on stderr, and with `as_json` as one JSON object on stdout too."""
    write(sys.stderr, "\n\n".join(_texts(problems[:SHOWN])))
    if len(problems) > SHOWN:
        rest = len(problems) - SHOWN
        write(sys.stderr, f"\n{len(problems)} problems, {rest} more with --json")
    elif len(problems) > 1:
        write(sys.stderr, f"\n{len(problems)} problems")
    if as_json:
        write_result(as_json_text(_failure(problems, exit_code)))


def _failure(problems: Sequence[Problem], exit_code: int) -> dict[str, Any]:
    found = [_cleaned(to_json(problem)) for problem in problems]
    return {"schema": SCHEMA, "status": "error", "exit_code": exit_code, "problems": found}


def _cleaned(value: Any) -> Any:
    """Return `value` with secrets removed from its texts."""
    if isinstance(value, dict):
        return {key: _cleaned(item) for key, item in value.items()}
    if isinstance(value, str):
        return without_secrets(value)
    return value


def _texts(problems: Sequence[Problem]) -> Iterator[str]:
    """Yield the text of each problem; a hint that the following one repeats is left to that one."""
    for problem, following in zip_longest(problems, problems[1:]):
        if following is not None and following.hint == problem.hint:
            problem = replace(problem, hint=None)
        yield _as_text(problem)


def _as_text(problem: Problem) -> str:
    lines = [f"error[{problem.code}]: {problem.message}"]
    if problem.code in STOPS:
        lines = [problem.message]
    if problem.location:
        lines += [f"  --> {problem.location}", *_line_at(problem.location)]
    if problem.hint:
        lines += ["", f"hint: {problem.hint}"]
    return joined(lines)


def _line_at(location: Location) -> list[str]:
    """Return the line of a file that the user wrote, with a caret below the column; [] without."""
    file = Path(location.file)
    try:
        if not file.is_file():
            return []
        lines = LINE_ENDS.split(file.read_text(encoding="utf-8-sig", errors="replace"))
    except OSError:
        return []
    if location.line > len(lines):
        return []
    line = lines[location.line - 1].replace("\t", " ")
    start = max(0, location.column - 1 - CARET_WIDTH)
    before = visible(line[start : location.column - 1])
    after = visible(line[location.column - 1 : start + 2 * CARET_WIDTH])
    number = f"{location.line:>4}"
    return [f"{number} | {before}{after}", f"{' ' * len(number)} | {' ' * len(before)}^"]


def write_result(text: str) -> None:
    """Write `text` on stdout; raise GptqError E_STDOUT for a full disk, not for a closed pipe."""
    with _stdout_errors():
        _print(sys.stdout, text)


def write_exactly(text: str, data: bytes) -> None:
    """Write `data` and a line end on stdout; a terminal gets `text`, which cannot control it."""
    with _stdout_errors():
        if sys.stdout is None or sys.stdout.isatty():
            _print(sys.stdout, text)
        elif not (sys.stdout.closed or log.muted):
            sys.stdout.flush()
            sys.stdout.buffer.write(data + b"\n")
            sys.stdout.buffer.flush()


def write_piece(text: str) -> None:
    """Write a part of a result on stdout at once; a terminal gets text that cannot control it."""
    with _stdout_errors():
        if sys.stdout is None or sys.stdout.closed or log.muted:
            return
        if sys.stdout.isatty():
            text = visible(text)
        sys.stdout.flush()
        sys.stdout.buffer.write(text.encode())
        sys.stdout.buffer.flush()


@contextmanager
def _stdout_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        _silence(sys.stdout)
        if not isinstance(error, BrokenPipeError):
            message = f"cannot write the result to stdout: {error.strerror}"
            raise GptqError("E_STDOUT", message) from None


def write(stream: TextIO | None, text: str) -> None:
    """Write `text` without secrets on `stream`; a stream that fails must not stop a run."""
    text = without_secrets(text)
    log.write(text)
    try:
        _print(stream, text)
    except OSError:
        _silence(stream)


def _print(stream: TextIO | None, text: str) -> None:
    if stream is not None and not stream.closed and not log.muted:
        encoding = stream.encoding or "utf-8"
        text = visible(text).encode(encoding, "backslashreplace").decode(encoding)
        if stream is sys.stderr:
            text = _wrapped(text, window(stream))
            if wants_colour(stream):
                text = _painted(text)
        stream.write(text + "\n")
        stream.flush()


def wants_colour(stream: TextIO) -> bool:
    """Return whether messages on `stream` have colours.

    --color decides, then NO_COLOR and FORCE_COLOR, then whether it is a terminal.
    """
    if log.colour != COLOURS[0]:
        return log.colour == "always"
    if os.environ.get("NO_COLOR"):
        return False
    if os.environ.get("FORCE_COLOR", "0") not in ("", "0"):
        return True
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def _wrapped(text: str, width: int) -> str:
    """Return messages with long lines wrapped at `width`; no wrapped part looks like a message.

    A line with a command or an option stays whole, so that a user can copy it.
    """
    lines = []
    for line in text.split("\n"):
        if WRAPPED.match(line) and not COPIED.search(line):
            line = _filled(line, width, 2)
        lines.append(line)
    return "\n".join(lines)


def _painted(text: str) -> str:
    """Return messages with colours for their first words; names in them cannot begin a line."""
    for words, colour in PAINT.items():
        text = words.sub(f"\x1b[{colour}m\\g<0>\x1b[0m", text)
    return text


def visible(text: str) -> str:
    """Return `text` with escape sequences made visible, because names in files could hold some."""
    return "".join(map(_visible_letter, text))


def time_line(seconds: float, width: int = 0) -> str:
    """Return the line about the time of the command, from its start with all imports until now.

    `seconds` is the time of the work itself, which counts if the command was not started by `main`.
    The value begins after a word of `width`.
    """
    began = float(os.environ.get(BEGAN, time() - seconds))
    return f"{'time':{width}} {clock(time() - began)}"


def on_one_line(text: str) -> str:
    """Return `text` on one line, because a name with a line end in it could forge a message."""
    return visible(text).replace("\n", "\\n")


def joined(lines: Iterable[str]) -> str:
    """Return `lines` as one text in which each of them is one line."""
    return "\n".join(map(on_one_line, lines))


def indented(text: str) -> str:
    """Return `text` with all lines but the first indented, so that none looks like a message."""
    return visible(text).replace("\n", "\n  ")


def _visible_letter(letter: str) -> str:
    if letter.isprintable() or letter in "\n\t":
        return letter
    return letter.encode("unicode-escape", "surrogatepass").decode()


def _silence(stream: TextIO | None) -> None:
    """Discard the buffer of a broken stream, so that Python's exit does not fail with it."""
    if stream is not None:
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        except (OSError, ValueError):
            return


def indented_lines(lines: Iterable[str]) -> list[str]:
    """Return `lines`, each with two blanks before it."""
    return [f"  {line}" for line in lines]


def fitted(line: str, indent: int = 2) -> str:
    """Return `line` wrapped and indented if stdout is a terminal and narrower, else unchanged.

    A line that begins with more blanks than `indent` keeps its own indent.
    """
    own = len(line) - len(line.lstrip(" "))
    return _filled(line, window(sys.stdout), max(indent, own))


def fitted_lines(lines: Iterable[str], indent: int) -> list[str]:
    """Return `lines` of a result, each `fitted`, with a name of `indent` columns at its start."""
    return [fitted(on_one_line(line), indent) for line in lines]


def _filled(line: str, width: int, indent: int) -> str:
    """Return `line` with its words in lines of at most `width` columns."""
    if len(line) <= width:
        return line
    return fill(
        line,
        width,
        subsequent_indent=" " * indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def window(stream: TextIO | None) -> int:
    """Return the columns of the terminal that `stream` is, a very large number if it is none."""
    if stream is None or not stream.isatty():
        return sys.maxsize
    columns = os.environ.get("COLUMNS", "")
    if columns.isdecimal() and int(columns):
        return int(columns)
    try:
        return os.get_terminal_size(stream.fileno()).columns or sys.maxsize
    except (OSError, ValueError):  # it has no file
        return get_terminal_size().columns


def shortened(names: Sequence[str], width: int, noun: str) -> str:
    """Return as many names as fit into `width` columns, and the number of the others.

    If no name fits, return their number with `noun`.
    """
    for shown in range(len(names), 0, -1):
        text = ", ".join(names[:shown])
        if shown < len(names):
            text += f" +{len(names) - shown}"
        if len(text) <= width:
            return text
    if names:
        return counted(len(names), noun)
    return "-"


def with_engines(
    lines: Sequence[str], loads: Sequence[Sequence[str]], most: int = sys.maxsize
) -> list[str]:
    """Return the `lines` of a table with a last column: the engines that load each row.

    The column has `most` letters at most, and fewer if stdout is a narrower terminal.
    """
    room = min(most, window(sys.stdout) - max(map(len, lines)) - 2)
    cells = ["loads in", *[shortened(engines, room, "engine") for engines in loads]]
    width = max(map(len, lines))
    return [f"{line:{width}}  {cell}" for line, cell in zip(lines, cells, strict=True)]


def row_lines(rows: Sequence[Row]) -> list[str]:
    """Return an aligned line for each row: count, name, shape, settings, reason."""
    cells = []
    for row in rows:
        shape = "x".join(map(str, row.shape))
        cells.append((f"{row.count} x", row.name, shape, row.settings, row.why))
    return aligned(cells, right={0})


def aligned(rows: Sequence[Sequence[str]], right: Collection[int] = ()) -> list[str]:
    """Return the rows as lines with aligned columns, two blanks apart.

    The columns whose indices are in `right` are flush right.
    """
    columns = []
    for index, column in enumerate(zip(*rows, strict=True)):
        cells = list(map(on_one_line, column))
        width = max(map(len, cells))
        if index in right:
            columns.append([cell.rjust(width) for cell in cells])
        else:
            columns.append([cell.ljust(width) for cell in cells])
    return ["  ".join(line).rstrip() for line in zip(*columns, strict=True)]


def engine_lines(judged: Sequence[Verdict]) -> list[str]:
    """Return the engines without a remark in short lines, then one line for each remark."""
    lines: list[str] = []
    clean = [verdict.engine for verdict in judged if verdict.outcome == "yes"]
    if clean:
        line = f"{WORDS['yes']} {', '.join(clean)}"
        width = min(ENGINES_WIDTH, window(sys.stdout))
        lines += wrap(line, width, subsequent_indent="  ", break_on_hyphens=False)
    for verdict in judged:
        if verdict.outcome != "yes":
            lines.append(f"{WORDS[verdict.outcome]} {verdict.engine}: {verdict.reason}")
    return list(map(on_one_line, lines))


def unread_line(judged: Sequence[Verdict]) -> str | None:
    """Return a line that names the engines that will not load a checkpoint, or None."""
    engines: dict[str, list[str]] = {}
    for verdict in judged:
        if verdict.outcome in ("no", "wrong"):
            engines.setdefault(WORDS[verdict.outcome], []).append(verdict.engine)
    if not engines:
        return None
    return "; ".join(f"{words} {', '.join(names)}" for words, names in engines.items())


@contextmanager
def libraries_quoted() -> Iterator[None]:
    """Indent log records and warnings of libraries in the body, so that none looks like a message.

    Their control characters become visible too.
    """
    make, warn = logging.getLogRecordFactory(), warnings.formatwarning

    def quoted(*arguments: Any, **named: Any) -> logging.LogRecord:
        record = make(*arguments, **named)
        with suppress(TypeError, ValueError):  # if the arguments do not fit, logging reports it
            record.msg, record.args = indented(record.getMessage()), ()
        return record

    def formatted(message: Warning | str, *arguments: Any, **named: Any) -> str:
        return indented(warn(message, *arguments, **named).rstrip("\n")) + "\n"

    logging.setLogRecordFactory(quoted)
    warnings.formatwarning = formatted
    try:
        yield
    finally:
        logging.setLogRecordFactory(make)
        warnings.formatwarning = warn
