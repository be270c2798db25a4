"""Errors become messages and exit codes; help pages and usage errors show the next step."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from gptq_cli import __version__
from gptq_cli.__main__ import main
from gptq_cli.cli import help_page
from gptq_cli.cli.app import COMMANDS, GROUPS, load_command
from gptq_cli.cli.console import BEGAN
from gptq_cli.config.layer import PRESETS
from gptq_cli.errors import (
    ConfigError,
    ExistsError,
    GateError,
    GptqError,
    InputError,
    Problem,
    ResourceError,
)
from gptq_cli.runtime.processes import LAUNCHER

from .conftest import FakeQuantizer, Run

README = Path(__file__).parents[2] / "README.md"


def test_help_lists_the_summary_of_each_command(gptq: Run) -> None:
    listing = gptq("--help")
    assert listing.exit_code == 0
    for name, summary in COMMANDS.items():
        page = gptq(name, "--help")
        assert page.exit_code == 0
        assert summary in page.stdout
        assert f"Example: gptq {name}" in page.stdout
        assert name in listing.stdout


@pytest.mark.parametrize("word", ["--version", "-V", "version"])
def test_version_is_one_line(word: str, gptq: Run) -> None:
    result = gptq(word)
    assert (result.exit_code, result.stdout, result.stderr) == (0, f"gptq {__version__}\n", "")


def test_help_groups_the_commands_as_the_readme_does(gptq: Run) -> None:
    rows = re.findall(r"^\| ([a-z ]+) \| (`gptq .*) \|$", README.read_text(), flags=re.MULTILINE)
    groups = {name.capitalize(): set(re.findall(r"`gptq ([a-z-]+)", row)) for name, row in rows}
    assert groups == {name: set(commands) for name, commands in GROUPS.items()}
    listing = gptq("--help").stdout
    titles = re.findall(r"^([A-Z][a-z ]+)$", listing, flags=re.MULTILINE)
    assert titles == [*GROUPS, "Options"]


def test_help_of_a_command_is_shown_under_its_name(gptq: Run) -> None:
    for words in (["help"], ["help", "verify"], ["help", "quantize"]):
        result = gptq(*words)
        assert (result.exit_code, result.stdout) == (0, gptq(*words[1:], "--help").stdout)
    for word in ("help", "version"):  # the page of the program shows them
        assert gptq("help", word).stdout == gptq("--help").stdout
    assert gptq("help", "quantize", "--help-all").stdout == gptq("quantize", "--help-all").stdout


EVERYDAY = ["bits", "group-size", "preset", "dataset", "target", "output", "config", "dry-run"]


@pytest.mark.parametrize("width", [60, 80, 120])
def test_quantize_shows_its_everyday_options_first(
    width: int, gptq: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    short, whole = gptq("quantize", "--help").stdout, gptq("quantize", "--help-all").stdout
    assert named_options(short) == [*EVERYDAY, "help-all", "help"]
    expected = set()
    for parameter in load_command("quantize").params:
        expected.update(word for word in parameter.opts if word.startswith("--"))
    assert expected <= {f"--{name}" for name in named_options(whole)}
    assert short.count("Example: gptq quantize") == 3
    assert max(map(len, (short + whole).splitlines())) <= width
    assert not re.search(r"<\w+>", short + whole)
    assert len(short.splitlines()) < {60: 70, 80: 50, 120: 45}[width]


def named_options(page: str) -> list[str]:
    """Return the long options that begin a row of a help page, in their order."""
    return re.findall(r"^  (?:-[a-zA-Z], )?--([a-z0-9-]+)", page, flags=re.MULTILINE)


@pytest.mark.parametrize("width", [60, 80])
def test_every_help_page_fits_and_names_every_option(
    width: int, gptq: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    for name in COMMANDS:
        command = load_command(name)
        page = gptq(name, "--help-all" if command.everyday else "--help").stdout
        assert max(map(len, page.splitlines())) <= width
        for parameter in command.params:
            assert parameter.opts[-1] in page or parameter.metavar in page
        assert not re.search(r"<\w+>", page)


def test_help_tells_when_to_take_each_preset(gptq: Run) -> None:
    shown = " ".join(gptq("quantize", "--help").stdout.split())
    for name, preset in PRESETS.items():
        assert f"{name} = {preset.advice}" in shown
    assert len({preset.advice for preset in PRESETS.values()}) == len(PRESETS)


def test_a_title_is_bold_on_a_terminal_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stdout", SimpleNamespace(isatty=lambda: True))
    assert help_page._bold("Run") == "\x1b[1mRun\x1b[0m"
    monkeypatch.setenv("NO_COLOR", "1")
    assert help_page._bold("Run") == "Run"
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setattr("sys.stdout", None)
    assert help_page._bold("Run") == "Run"


def test_no_arguments_show_help_as_a_usage_error(gptq: Run) -> None:
    result = gptq()
    assert result.exit_code == 2
    assert "quantize" in result.stdout


@pytest.mark.parametrize(
    ("words", "message", "hint"),
    [
        (
            ["quantise", "m"],
            "error[E_USAGE]: there is no command `quantise`",
            "did you mean quantize?",
        ),
        (
            ["quantize", "m", "--group-sise", "4"],
            "error[E_USAGE]: there is no option --group-sise",
            "--group-size?",
        ),
        (
            ["quantize", "m", "--nsamples", "four"],
            "--nsamples must be a whole number",
            "see gptq quantize --help",
        ),
        (
            ["quantize", "m", "--damp-percent", "x"],
            "--damp-percent must be a number",
            "quantize --help",
        ),
        (["quantize"], "error[E_USAGE]: the argument MODEL is missing", "see gptq quantize --help"),
        (["help", "plam"], "there is no command `plam`", "did you mean plan?"),
        (["quantize", "m", "help"], "takes no further argument", "see gptq quantize --help"),
        (["quantize", "m", "--bit", "3"], "there is no option --bit", "--bits?"),
        (["quantize", "m", "--bits"], "the option --bits needs a value", "see --help"),
        (
            ["quantize", "m", "more"],
            "takes no further argument",
            "give the output with -o; see gptq quantize --help",
        ),
        (
            ["quantize", "m", "--protect", "--bits", "3"],
            "error[E_USAGE]: --protect needs a value, but the option --bits follows",
            "give a value: --protect REGEX; see gptq quantize --help",
        ),
        (
            ["quantize", "m", "-o", "--no-pack"],
            "error[E_USAGE]: -o needs a value, but the option --no-pack follows",
            "give a value: -o DIR; see gptq quantize --help",
        ),
        (["inspect", "m", "more"], "takes no further argument", "hint: see gptq inspect --help"),
    ],
)
def test_usage_errors_suggest_the_intended_word(
    words: list[str], message: str, hint: str, gptq: Run
) -> None:
    result = gptq(*words)
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr
    assert hint in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("error", "exit_code"),
    [
        (ConfigError("E_X", "bad [red]words[/red]", hint="fix it"), 2),
        (InputError("E_X", "bad [red]words[/red]", hint="fix it"), 3),
        (GateError("E_X", "bad [red]words[/red]", hint="fix it"), 4),
        (ResourceError("E_X", "bad [red]words[/red]", hint="fix it"), 5),
        (ExistsError("E_X", "bad [red]words[/red]", hint="fix it"), 6),
    ],
)
def test_an_expected_failure_prints_message_hint_and_code(
    error: GptqError, exit_code: int, gptq: Run, quantizer: FakeQuantizer
) -> None:
    quantizer.error = error
    result = gptq("quantize", "m", "-b", "4", "-q")
    assert (result.exit_code, result.stdout) == (exit_code, "")
    assert result.stderr.endswith("error[E_X]: bad [red]words[/red]\n\nhint: fix it\n")
    result = gptq("quantize", "m", "-b", "4", "-q", "--json")
    problem = {
        "code": "E_X",
        "message": "bad [red]words[/red]",
        "hint": "fix it",
        "location": None,
    }
    expected = {"schema": 1, "status": "error", "exit_code": exit_code, "problems": [problem]}
    assert (result.exit_code, json.loads(result.stdout)) == (exit_code, expected)


def test_several_problems_are_all_printed_and_counted(gptq: Run, quantizer: FakeQuantizer) -> None:
    quantizer.error = ConfigError.of([Problem("E_A", "one"), Problem("E_B", "two", "fix it")])
    result = gptq("quantize", "m", "-b", "4", "-q")
    assert result.stderr.endswith(
        "error[E_A]: one\n\nerror[E_B]: two\n\nhint: fix it\n\n2 problems\n"
    )


def test_a_bug_shows_its_traceback_and_exits_1(gptq: Run, quantizer: FakeQuantizer) -> None:
    quantizer.error = ZeroDivisionError("by zero")
    result = gptq("quantize", "m", "-b", "4", "--json")
    assert result.exit_code == 1
    assert "Traceback" in result.stderr
    assert "error[E_BUG]: ZeroDivisionError: by zero" in result.stderr
    assert json.loads(result.stdout)["problems"][0]["code"] == "E_BUG"


def test_an_interrupt_exits_130_without_traceback(gptq: Run, quantizer: FakeQuantizer) -> None:
    quantizer.error = KeyboardInterrupt()
    result = gptq("quantize", "m", "-b", "4", "--json")
    assert result.exit_code == 130
    assert "Traceback" not in result.stderr
    assert json.loads(result.stdout)["exit_code"] == 130


def test_usage_errors_are_json_if_asked(gptq: Run) -> None:
    result = gptq("quantize", "--json")
    assert result.exit_code == 2
    assert json.loads(result.stdout)["problems"][0]["code"] == "E_USAGE"


@pytest.mark.parametrize(
    ("words", "before"),
    [
        (["quantize", "", "-b", "4"], "gptq quantize"),
        (["verify", ""], "gptq verify"),
        (["plan", "m", "-o", ""], "gptq plan m -o"),
    ],
)
def test_an_empty_argument_is_a_usage_error(words: list[str], before: str, gptq: Run) -> None:
    result = gptq(*words)
    assert result.exit_code == 2
    assert f"error[E_USAGE]: empty argument after `{before}`" in result.stderr
    assert "is a variable of the shell not set?" in result.stderr


def test_terminal_escapes_in_names_are_escaped(gptq: Run) -> None:
    result = gptq("validate-config", "no\x1b[31m.yaml")
    assert result.exit_code == 2
    assert "no\\x1b[31m.yaml" in result.stderr
    assert "\x1b" not in result.stderr


def test_an_interrupt_before_any_command_exits_130(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupted(**_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("gptq_cli.cli.app.app", interrupted)
    monkeypatch.setenv(BEGAN, "0")  # so that it is restored
    with pytest.raises((SystemExit, KeyboardInterrupt)) as caught:
        main()
    assert str(caught.value) == "130"


def test_the_processes_of_a_command_share_the_time_at_which_it_began(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    began: list[str] = []
    monkeypatch.setattr("gptq_cli.cli.app.app", lambda **_: began.append(os.environ[BEGAN]))
    monkeypatch.setattr("gptq_cli.__main__.time.time", lambda: 1000.5)
    monkeypatch.setenv(BEGAN, "yesterday")  # as a shell might pass it on
    main()
    monkeypatch.setattr("gptq_cli.__main__.time.time", lambda: 2000.5)
    monkeypatch.setenv(LAUNCHER, "4711")
    main()  # as a process of --devices does
    assert began == ["1000.5", "1000.5"]


def test_stderr_shows_8_of_30_problems_and_json_shows_all(gptq: Run, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"bits": 4, **{f"other_{number}": 1 for number in range(30)}}))
    stderr = gptq("validate-config", file).stderr
    assert stderr.count("error[") == 8
    assert stderr.splitlines()[-1] == "30 problems, 22 more with --json"
    assert len(json.loads(gptq("validate-config", file, "--json").stdout)["problems"]) == 30
