"""The two streams: stdout holds the result and nothing else, stderr the messages; user text is
never markup.

Rows and verdicts about engines become aligned text; nothing is wrapped or cut, whatever the width
of the terminal.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from shutil import get_terminal_size
from textwrap import fill
from time import gmtime
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

import typer

from gptq_cli.errors import ConfigError, GptqError, Problem, __version__, without_secrets

if TYPE_CHECKING:
    from logging import FileHandler, LogRecord

    from gptq_cli.config.serving import Verdict
    from gptq_cli.config.serving_table import Outcome
    from gptq_cli.inspection.summary import Row


SCHEMA = 1
SHOWN = 8  # problems on a terminal
LOG_MARK = "log of gptq"

WORDS: dict[Outcome, str] = {
    "yes": "loads in",
    "limited": "loads with limits in",
    "wrong": "loads WRONGLY in",
    "no": "does not load in",
}


@dataclass(frozen=True, slots=True)
class Console:
    """How one command speaks: `--json` makes the result one JSON object, `--quiet` leaves the least that is useful."""

    as_json: bool = False
    quiet: bool = False

    def say(self, line: str) -> None:
        """A line of progress or advice, on stderr; not with `--quiet`."""
        line = on_one_line(line)
        if self.quiet:
            log.write(line)
        else:
            write(sys.stderr, line)

    def detail(self, line: str) -> None:
        """A line for those who asked for more: on stderr with `--verbose`, in the log file always."""
        line = on_one_line(line)
        if log.verbose and not self.quiet:
            write(sys.stderr, line)
        else:
            log.write(line)

    def warn(self, code: str, message: str) -> None:
        """A line on stderr that `--quiet` does not hide."""
        write(sys.stderr, on_one_line(f"warning[{code}]: {message}"))

    def advise(self, line: str) -> None:
        """A line on stderr that the user needs to go on; `--quiet` does not hide it."""
        write(sys.stderr, on_one_line(line))

    def result(self, data: dict[str, Any], human: str, short: str | Path) -> None:
        """The result on stdout, in the form asked for; GptqError E_STDOUT if stdout cannot take it.

        A path as `short` is printed byte for byte, so that it can be opened.
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
        """A result that is itself the content of a file: UTF-8 and unchanged, with `--json` as part of `data`."""
        if self.as_json:
            self.result(data, text, text)
        else:
            write_exactly(text, text.encode())

    def refused(self, data: dict[str, Any], human: str, short: str, error: GptqError) -> NoReturn:
        """A result that did not pass: printed like any other, with `error` after it and as one object with `--json`."""
        if self.as_json:
            write_result(as_json_text({**_failure(error.problems, error.exit_code), **data}))
        else:
            write_result(short if self.quiet else human)
        report_problems(error.problems, error.exit_code, as_json=False)
        raise typer.Exit(error.exit_code)


class Log:
    """What `--verbose` and `--log-file` ask of everything that is said on stderr, for as long as a command runs."""

    def __init__(self) -> None:
        self.verbose = False
        self.muted = os.environ.get("RANK", "0") != "0"  # of several processes the first one talks
        self._handler: FileHandler | None = None
        self._failure: OSError | None = None  # why the file could not be written

    def begin(self, *, verbose: bool, log_file: Path | None) -> None:
        """Say more, and keep a copy in a file, with the time of each line; ConfigError E_LOG_FILE if it cannot be."""
        self.verbose = verbose
        if log_file is None or self.muted:
            return
        from logging import FileHandler, Formatter

        try:
            self._handler = FileHandler(log_file, encoding="utf-8")
        except OSError as error:
            message = f"cannot write the log file `{log_file}`: {error.strerror}"
            raise ConfigError(
                "E_LOG_FILE", message, hint="choose another place for --log-file"
            ) from None
        formatter = Formatter("%(asctime)s.%(msecs)03dZ %(message)s", "%Y-%m-%dT%H:%M:%S")
        formatter.converter = gmtime
        self._handler.setFormatter(formatter)
        self._handler.handleError = self._note_failure  # type: ignore[method-assign]
        self.write(
            f"{LOG_MARK} {__version__}"
        )  # a later command recognises the file by its first line

    def write(self, text: str) -> None:
        """The lines of `text` in the log file, if there is one."""
        if self._handler is not None:
            from logging import INFO, LogRecord

            for line in visible(without_secrets(text)).splitlines():
                self._handler.emit(LogRecord("gptq", INFO, "", 0, line, None, None))
            if self._failure is not None:
                self._give_up()

    def end(self) -> None:
        """Close the file; what is said later is no longer kept."""
        if self._handler is not None:
            with suppress(OSError):  # what could not be written was told
                self._handler.close()
        self.verbose, self._handler, self._failure = False, None, None

    def _note_failure(self, record: LogRecord) -> None:
        """Remember why a line could not be written: a log must not change what a command ends with."""
        del record
        error = sys.exc_info()[1]
        if isinstance(error, OSError):
            self._failure = error

    def _give_up(self) -> None:
        """Stop logging and say so once."""
        handler, error = self._handler, self._failure
        self._handler = self._failure = None
        assert handler is not None
        assert error is not None
        message = f"cannot write the log file `{handler.baseFilename}`: {error.strerror}; nothing more is logged"
        Console().warn("W_LOG_FILE", message)
        with suppress(OSError):
            handler.close()


log = Log()


def as_json_text(data: dict[str, Any]) -> str:
    """One JSON object on one line of printable ASCII; floats that JSON does not know become null."""
    return json.dumps(_finite(data), allow_nan=False).replace("\x7f", "\\u007f")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not float("-inf") < value < float("inf") else value


def report_problems(problems: Sequence[Problem], exit_code: int, *, as_json: bool) -> None:
    """What went wrong, for people on stderr and with `as_json` for scripts on stdout."""
    write(sys.stderr, "\n\n".join(_as_text(problem) for problem in problems[:SHOWN]))
    if len(problems) > 1:
        rest = f", {len(problems) - SHOWN} more with --json" if len(problems) > SHOWN else ""
        write(sys.stderr, f"\n{len(problems)} problems{rest}")
    if as_json:
        write_result(as_json_text(_failure(problems, exit_code)))


def _failure(problems: Sequence[Problem], exit_code: int) -> dict[str, Any]:
    found = [_as_data(problem) for problem in problems]
    return {"schema": SCHEMA, "status": "error", "exit_code": exit_code, "problems": found}


def _as_text(problem: Problem) -> str:
    lines = [f"error[{problem.code}]: {problem.message}"]
    lines += [f"  --> {problem.location}"] if problem.location else []
    lines += ["", f"hint: {problem.hint}"] if problem.hint else []
    return joined(lines)


def _as_data(problem: Problem) -> dict[str, Any]:
    at = problem.location
    location = (
        {"file": without_secrets(at.file), "line": at.line, "column": at.column} if at else None
    )
    hint = without_secrets(problem.hint) if problem.hint else None
    return {
        "code": problem.code,
        "message": without_secrets(problem.message),
        "hint": hint,
        "location": location,
    }


def write_result(text: str) -> None:
    """`text` on stdout; a reader who went away is no failure, a full disk is E_STDOUT."""
    with _stdout_errors():
        _print(sys.stdout, text)


def write_exactly(text: str, data: bytes) -> None:
    """`data` and an end of line on stdout; a terminal gets `text`, which cannot control it."""
    with _stdout_errors():
        if sys.stdout is None or sys.stdout.isatty():
            _print(sys.stdout, text)
        elif not (sys.stdout.closed or log.muted):
            sys.stdout.flush()
            sys.stdout.buffer.write(data + b"\n")
            sys.stdout.buffer.flush()


@contextmanager
def _stdout_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        _silence(sys.stdout)
        if not isinstance(error, BrokenPipeError):
            raise GptqError(
                "E_STDOUT", f"cannot write the result to stdout: {error.strerror}"
            ) from None


def write(stream: TextIO | None, text: str) -> None:
    """`text` without secrets on `stream` if it takes it: talk that nobody can hear must not stop a run."""
    text = without_secrets(text)
    log.write(text)
    try:
        _print(stream, text)
    except OSError:
        _silence(stream)


def _print(stream: TextIO | None, text: str) -> None:
    if stream is not None and not stream.closed and not log.muted:
        encoding = stream.encoding or "utf-8"
        stream.write(visible(text).encode(encoding, "backslashreplace").decode(encoding) + "\n")
        stream.flush()


def visible(text: str) -> str:
    """`text` without terminal control, since names in files could hold escape sequences."""
    return "".join(map(_visible_letter, text))


def on_one_line(text: str) -> str:
    """`text` as it is shown in a line of its own: a name in a file could hold an end of line and forge the next one."""
    return visible(text).replace("\n", "\\n")


def joined(lines: Iterable[str]) -> str:
    """A result of several lines, each of which stays one."""
    return "\n".join(map(on_one_line, lines))


def indented(text: str) -> str:
    """`text` of several lines, of which none but the first begins where lines of this program do."""
    return visible(text).replace("\n", "\n  ")


def _visible_letter(letter: str) -> str:
    if letter.isprintable() or letter in "\n\t":
        return letter
    return letter.encode("unicode-escape", "surrogatepass").decode()


def _silence(stream: TextIO | None) -> None:
    """Let the rest of a broken stream's buffer go nowhere, so that Python's exit does not trip over it."""
    if stream is not None:
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        except (OSError, ValueError):
            return


def fitted(line: str, indent: int = 2) -> str:
    """`line` broken between words where a terminal on stdout is narrower, the rest indented; elsewhere as it is."""
    if sys.stdout is None or not sys.stdout.isatty():
        return line
    width = get_terminal_size().columns
    return fill(
        line, width, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False
    )


def row_lines(rows: Sequence[Row]) -> list[str]:
    """A line a row: count, name, shape, settings, reason."""
    cells = [
        (f"{row.count} x", row.name, "x".join(map(str, row.shape)), row.settings, row.why)
        for row in rows
    ]
    return aligned(cells, right={0})


def aligned(cells: Sequence[Sequence[str]], right: set[int] | None = None) -> list[str]:
    """Lines with each column as wide as its longest cell, two blanks apart; columns in `right` are flush right."""
    cells = [[on_one_line(cell) for cell in line] for line in cells]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(_fit(cell, i, width, right) for i, (cell, width) in enumerate(zip(line, widths, strict=True)))
            .rstrip() for line in cells]  # fmt: skip


def _fit(cell: str, column: int, width: int, right: set[int] | None) -> str:
    return cell.rjust(width) if column in (right or ()) else cell.ljust(width)


def row_data(rows: Sequence[Row]) -> list[dict[str, object]]:
    """Rows as plain JSON values."""
    return [
        {
            "count": row.count,
            "name": row.name,
            "shape": list(row.shape),
            "settings": row.settings,
            "why": row.why,
            "bytes": row.nbytes,
        }
        for row in rows
    ]


def engine_lines(judged: Sequence[Verdict]) -> list[str]:
    """A line for the engines without a remark, then one for each with its reason."""
    clean = [verdict.engine for verdict in judged if verdict.outcome == "yes"]
    remarks = [verdict for verdict in judged if verdict.outcome != "yes"]
    lines = [f"{WORDS['yes']} {', '.join(clean)}"] if clean else []
    lines += [f"{WORDS[verdict.outcome]} {verdict.engine}: {verdict.reason}" for verdict in remarks]
    return list(map(on_one_line, lines))


def unread_line(judged: Sequence[Verdict]) -> str | None:
    """One line that names who will not load a checkpoint, None if all will."""
    found: dict[str, list[str]] = {}
    for verdict in judged:
        if verdict.outcome in ("no", "wrong"):
            found.setdefault(WORDS[verdict.outcome], []).append(verdict.engine)
    return "; ".join(f"{word} {', '.join(names)}" for word, names in found.items()) or None


@contextmanager
def libraries_quoted() -> Iterator[None]:
    """In the body no log record or warning of a library can look like a line of gptq, or control the terminal."""
    make, warn = logging.getLogRecordFactory(), warnings.formatwarning

    def quoted(*arguments: Any, **named: Any) -> logging.LogRecord:
        record = make(*arguments, **named)
        with suppress(TypeError, ValueError):  # arguments that do not fit: logging says so itself
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
