"""A stranger gets the expected answer in narrow and wide windows, in a terminal and in a pipe."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import shlex
import struct
import sys
import termios
from pathlib import Path

import pytest
from typer.testing import CliRunner

from gptq_cli.cli.app import COMMANDS, app
from tests.cli.conftest import remove_variables
from tests.families import save_model

from .commands import CONTACTS, Contact

WIDTHS = (60, 80, 120)
CONTROL = re.compile(r"\x1b\[[\d;]*m|\r")  # colours, and the line ends of a terminal


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write what a stranger has: a model with an odd size, a recipe with a typo, other files."""
    folder = tmp_path_factory.mktemp("first")
    shape = {"num_hidden_layers": 2, "hidden_size": 128, "intermediate_size": 192}
    save_model(folder / "Qwen3-0.6B", "qwen3", **shape)
    (folder / "recipe.yaml").write_text("bits: 4\ngroupsize: 64\n", encoding="utf-8")
    (folder / "notes.pdf").write_bytes(b"%PDF-1.4")
    (folder / "empty").mkdir()
    return folder


@pytest.fixture(autouse=True)
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remove_variables(monkeypatch)
    for name in ("NO_COLOR", "COLUMNS", "LINES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.chdir(folder)


def in_a_pipe(words: list[str], width: int, monkeypatch: pytest.MonkeyPatch) -> tuple[int, str]:
    """Run the program without a terminal; return its exit code and all that it prints."""
    monkeypatch.setenv("COLUMNS", str(width))
    done = CliRunner().invoke(app, words)
    return done.exit_code, done.stdout + done.stderr


def in_a_terminal(words: list[str], width: int) -> tuple[int, str]:
    """Run the program in a forked process with a terminal of `width` columns."""
    child, terminal = pty.fork()
    if not child:
        fcntl.ioctl(1, termios.TIOCSWINSZ, struct.pack("HHHH", 50, width, 0, 0))
        sys.stdout, sys.stderr = open(1, "w"), open(2, "w")  # noqa: SIM115
        code = 1
        try:
            app(words, prog_name="gptq")
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    printed = b""
    while True:
        try:
            part = os.read(terminal, 4096)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        printed += part
    os.close(terminal)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), printed.decode()


def check(contact: Contact, exit_code: int, printed: str) -> None:
    """Compare an answer with what is expected; where lines break does not matter."""
    assert exit_code == contact.exit_code, printed
    assert "Traceback" not in printed
    words = " ".join(CONTROL.sub("", printed).split())
    place = 0
    for part in contact.says:
        place = words.find(part, place)
        assert place >= 0, f"{part!r} is not where it should be in:\n{printed}"


def test_there_are_forty_commands_of_which_most_fail() -> None:
    lines = {contact.line for contact in CONTACTS}
    assert len(lines) == len(CONTACTS) >= 40
    assert sum(contact.exit_code != 0 for contact in CONTACTS) >= 25


@pytest.mark.parametrize("contact", CONTACTS, ids=lambda contact: contact.line)
def test_a_pipe_gets_the_expected_answer(contact: Contact, monkeypatch: pytest.MonkeyPatch) -> None:
    words = shlex.split(contact.line)[1:]
    for width in WIDTHS:
        exit_code, printed = in_a_pipe(words, width, monkeypatch)
        assert "\x1b" not in printed
        check(contact, exit_code, printed)


@pytest.mark.parametrize("contact", CONTACTS, ids=lambda contact: contact.line)
def test_a_terminal_gets_the_expected_answer(contact: Contact) -> None:
    words = shlex.split(contact.line)[1:]
    for width in (min(WIDTHS), max(WIDTHS)):
        exit_code, printed = in_a_terminal(words, width)
        check(contact, exit_code, printed)
        if exit_code != 0 and "error[" in printed:
            assert "\x1b[" in printed  # errors have colours here


@pytest.mark.parametrize("width", WIDTHS)
def test_every_help_page_fits_the_window(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in COMMANDS:
        for words in ([name, "--help"], [name, "--help-all"]):
            exit_code, printed = in_a_pipe(words, width, monkeypatch)
            if words[1] == "--help-all" and exit_code == 2:
                continue  # a command whose --help shows all
            assert exit_code == 0
            assert "<bool>" not in printed
            lines = [line for line in printed.splitlines() if not line.startswith("Example: ")]
            longer = [line for line in lines if len(line) > width]
            assert longer == [], f"gptq {shlex.join(words)}"


@pytest.mark.parametrize("bits", [(), ("--bits", "4")])
@pytest.mark.parametrize("width", [56, *WIDTHS])
def test_a_plan_fits_a_terminal(width: int, bits: tuple[str, ...]) -> None:
    exit_code, printed = in_a_terminal(["plan", "Qwen3-0.6B", "-g", "64", *bits], width)
    lines = CONTROL.sub("", printed).splitlines()
    assert exit_code == 0
    assert len(lines) > 8
    assert max(map(len, lines)) <= width


@pytest.mark.parametrize("width", WIDTHS)
def test_the_list_of_recipes_fits_a_terminal(width: int) -> None:
    exit_code, printed = in_a_terminal(["recipes"], width)
    lines = CONTROL.sub("", printed).splitlines()
    assert exit_code == 0
    assert len(lines) >= 7
    assert max(map(len, lines)) <= width
