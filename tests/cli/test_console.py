"""Sizes, times, JSON and wrapped prose."""

from __future__ import annotations

import io
import json
import math
import sys

import pytest
import typer

from gptq_cli.cli.app import app
from gptq_cli.cli.console import Console, as_json_text, fitted, shortened, with_engines, write
from gptq_cli.errors import clock, size

from .conftest import Run


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 KB"),
        (5_400_000, "5.4 MB"),
        (999_900, "1 MB"),
        (1.234e12, "1.23 TB"),
        (5e15, "5e+03 TB"),
    ],
)
def test_sizes_have_three_digits(n_bytes: float, text: str) -> None:
    assert size(n_bytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0:00:00"), (59.6, "0:01:00"), (3723.4, "1:02:03")]
)
def test_times_are_hours_minutes_seconds(seconds: float, text: str) -> None:
    assert clock(seconds) == text


def test_json_has_null_for_nan_and_infinity() -> None:
    data = {"a": [math.nan, math.inf, 1.5], "b": {"c": (-math.inf, True)}}
    assert json.loads(as_json_text(data)) == {"a": [None, None, 1.5], "b": {"c": [None, True]}}


def test_only_a_narrow_terminal_wraps_prose(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    line = "NAME      what it is for, and /a/path/that/is/longer/than/the/terminal/is/wide"
    monkeypatch.setenv("COLUMNS", "40")
    assert fitted(line, 10) == line
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    shown = fitted(line, 10).splitlines()
    assert shown[0] == "NAME      what it is for, and"
    assert shown[1:] == [" " * 10 + "/a/path/that/is/longer/than/the/terminal/is/wide"]
    monkeypatch.setenv("COLUMNS", "200")
    assert fitted(line, 10) == line


def test_a_wrapped_line_keeps_its_own_indent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert fitted("          one two three four", 8) == "          one two\n          three four"
    assert fitted("    one two three four five", 8) == "    one two three\n        four five"


PROSE = "the first of several words about what has happened here"
WHOLE = [
    "next: gptq eval-ppl ./out --baseline ./model --dataset FILE",
    "hint: finish it: gptq resume '.a b.gptq-work', or choose another name",
    "hint: allow other widths with the option --allow-bits 3,4 --bits 3.5",
    "block 1/4 model.layers.0 error 1.6e-03 (rtn 7.2e-03) 2.1 s eta 0:00:06",
    "   3 | a line of the file that is longer than the terminal is wide",
]


@pytest.mark.parametrize("start", ["error[E_X]:", "warning[W_X]:", "hint:", "note:"])
def test_a_narrow_terminal_wraps_messages_between_words(
    start: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    write(sys.stderr, f"{start} {PROSE}")
    assert capsys.readouterr().err == f"{start} {PROSE}\n"  # no terminal
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("NO_COLOR", "1")
    write(sys.stderr, f"{start} {PROSE}\nother {PROSE}")
    *lines, other = capsys.readouterr().err.splitlines()
    assert other == f"other {PROSE}"
    assert max(map(len, lines)) <= 40
    assert [line.startswith("  ") for line in lines] == [False] + [True] * (len(lines) - 1)
    assert " ".join(" ".join(lines).split()) == f"{start} {PROSE}"


@pytest.mark.parametrize("line", WHOLE)
def test_what_a_user_copies_and_what_shows_a_place_is_not_wrapped(
    line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    write(sys.stderr, line)
    assert capsys.readouterr().err == f"{line}\n"


def test_a_command_writes_each_warning_once(capsys: pytest.CaptureFixture[str]) -> None:
    for console in (Console(), Console(quiet=True)):
        for message in ("slow", "late", "slow"):
            console.warn("W_X", message)
        console.warn("W_Y", "slow")
    written = "warning[W_X]: slow\nwarning[W_X]: late\nwarning[W_Y]: slow\n"
    assert capsys.readouterr().err == 2 * written


def test_engines_fill_the_rest_of_a_row_of_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    lines, loads = ["bits  size", " 3.5"], [["vllm", "mlx-lm", "exllamav3", "auto-round"]]
    whole = ["bits  size  loads in", " 3.5        vllm, mlx-lm, exllamav3, auto-round"]
    monkeypatch.setenv("COLUMNS", "30")
    assert with_engines(lines, loads) == whole
    assert with_engines(lines, [[]])[1] == " 3.5        -"
    assert with_engines(lines, loads, 12)[1] == " 3.5        vllm +3"
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert with_engines(lines, loads)[1] == " 3.5        vllm, mlx-lm +2"
    assert with_engines(lines, loads, 12)[1] == " 3.5        vllm +3"
    monkeypatch.setenv("COLUMNS", "16")
    assert with_engines(lines, loads)[1] == " 3.5        4 engines"


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


CALLS: list[tuple[list[str], dict[str, str], bool, bool]] = [
    # words, environment, on a terminal, coloured
    ([], {}, True, True),
    ([], {}, False, False),
    ([], {"TERM": "dumb"}, True, False),
    ([], {"NO_COLOR": "1"}, True, False),
    ([], {"FORCE_COLOR": "1"}, False, True),
    ([], {"FORCE_COLOR": "0"}, False, False),
    (["--color", "always"], {"NO_COLOR": "1"}, False, True),
    (["--color=never"], {"FORCE_COLOR": "1"}, True, False),
    (["--color", "auto"], {}, True, True),
    (["--", "--color=always"], {}, False, False),
]


@pytest.mark.parametrize(("words", "environment", "terminal", "coloured"), CALLS)
def test_messages_are_coloured_where_it_is_wanted(
    words: list[str],
    environment: dict[str, str],
    terminal: bool,
    coloured: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    screen = io.StringIO()
    if terminal:
        screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    program = typer.main.get_command(app)
    assert program.main(["explain", "E_NONE", *words], standalone_mode=False) == 2
    painted = "\x1b[1;31merror[" in screen.getvalue()
    assert (painted, "\x1b" in screen.getvalue()) == (coloured, coloured)
    assert "hint" in screen.getvalue()


def test_a_wrong_colour_is_refused_with_the_values(gptq: Run) -> None:
    result = gptq("explain", "--color", "allways")
    assert result.exit_code == 2
    expected = "error[E_CFG_RANGE]: --color must be auto, always or never, got "
    assert result.stderr == f'{expected}"allways"\n\nhint: did you mean always?\n'


def test_names_that_do_not_fit_become_a_number() -> None:
    names = ["transformers", "gptqmodel", "auto-round"]
    shown = [shortened(names, width, "engine") for width in (40, 25, 15, 14)]
    assert shown == [", ".join(names), "transformers +2", "transformers +2", "3 engines"]
    assert shortened([], 14, "engine") == "-"
