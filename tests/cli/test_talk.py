"""--verbose, --log-file, tokens, the width of the terminal and `gptq env`."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from gptq_cli import __version__
from gptq_cli.cli.app import COMMANDS
from gptq_cli.errors import GateError

from .conftest import FakeQuantizer, Run
from .processes import shell

TOKEN = "hf_" + "aB3" * 11


def test_verbose_adds_a_line_for_each_layer(gptq: Run, quantizer: FakeQuantizer) -> None:
    words = ["quantize", "m", "-b", "4"]
    short, long = gptq(*words), gptq(*words, "--verbose")
    assert "layer model.layers" not in short.stderr
    layers = [line for line in long.stderr.splitlines() if line.startswith("layer ")]
    assert len(layers) == 4
    assert layers[0] == (
        "layer model.layers.0.q_proj error 1.0e-04 (rtn 3.0e-04) "
        "4 bit group_size 128 damp 0.1 tokens 4096 0.50 s"
    )
    assert long.stdout == short.stdout
    assert len(quantizer.calls) == 2


@pytest.mark.usefixtures("quantizer")
def test_the_log_has_the_lines_that_quiet_hides_with_times(gptq: Run, tmp_path: Path) -> None:
    log = tmp_path / "run.log"
    result = gptq("quantize", "m", "-b", "4", "-q", "--log-file", log)
    assert "layer " not in result.stderr
    assert "block 1/2" not in result.stderr
    lines = log.read_text(encoding="utf-8").splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z ", line) for line in lines)
    messages = [line.split(" ", 1)[1] for line in lines]
    assert sum(message.startswith("layer ") for message in messages) == 4
    assert sum(message.startswith("block ") for message in messages) == 2
    assert sum(message.startswith("warning[W_TEST]") for message in messages) == 2


def test_a_traceback_is_appended_to_the_log_but_not_printed(
    gptq: Run, quantizer: FakeQuantizer, tmp_path: Path
) -> None:
    log = tmp_path / "run.log"
    words = ["quantize", "m", "-b", "4", "-q", "--log-file", log]
    gptq(*words)
    before = log.read_text(encoding="utf-8")
    quantizer.error = GateError("E_NUM_ACT", "broken")
    result = gptq(*words)
    assert "Traceback" not in result.stderr
    text = log.read_text(encoding="utf-8")
    assert text.startswith(before.rstrip("\n"))
    assert "Traceback" in text
    assert "error[E_NUM_ACT]: broken" in text


def test_the_log_ends_with_its_command(gptq: Run, quantizer: FakeQuantizer, tmp_path: Path) -> None:
    log = tmp_path / "run.log"
    quantizer.error = GateError("E_NUM_ACT", "broken")
    gptq("quantize", "m", "-b", "4", "-q", "--log-file", log)
    text = log.read_text(encoding="utf-8")
    gptq("explain", "nothing")
    assert log.read_text(encoding="utf-8") == text


def test_an_unwritable_log_is_refused_before_the_run(
    gptq: Run, quantizer: FakeQuantizer, tmp_path: Path
) -> None:
    result = gptq("quantize", "m", "-b", "4", "--log-file", tmp_path / "none" / "run.log")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith(
        f"error[E_LOG_FILE]: cannot write the log file `{tmp_path}/none/run.log`: No such"
    )
    assert "hint: choose another place" in result.stderr
    assert quantizer.calls == []


def test_tokens_of_the_hub_are_never_shown(
    gptq: Run, quantizer: FakeQuantizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    quantizer.error = GateError("E_NUM_ACT", f"refused with {TOKEN}", hint=TOKEN)
    log = tmp_path / "log"
    failed = gptq("quantize", "m", "-b", "4", "-v", "--json", "--log-file", log)
    environment = gptq("env", "--json")
    for result in (failed, environment):
        assert TOKEN not in result.stdout + result.stderr
    assert TOKEN not in log.read_text()
    assert json.loads(environment.stdout)["variables"]["HF_TOKEN"] == "set"


def test_env_prints_versions_and_variables(gptq: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPTQ_BITS", "4")
    data = json.loads(gptq("env", "--json").stdout)
    assert data["versions"]["torch"].startswith("2.")
    assert data["variables"]["GPTQ_BITS"] == "4"
    assert "torch" in gptq("env").stdout
    assert gptq("env", "-q").stdout == f"{__version__}\n"


def test_help_fits_a_narrow_terminal() -> None:
    lines = shell("$GPTQ quantize --help", COLUMNS="40", TERM="dumb").stdout.splitlines()
    assert len(lines) > 40
    assert max(map(len, lines)) <= 40


def test_a_long_path_is_never_broken(tmp_path: Path) -> None:
    path = tmp_path / ("a-long-name-" * 12)
    for words in (
        f"inspect {path}",
        f"report {path}",
        f"plan {path} -b 4",
        f"explain x --log-file {path}/x",
    ):
        assert f"`{path}" in shell(f"$GPTQ {words}", COLUMNS="40").stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_a_misspelt_command_or_option_gets_a_hint(command: str, gptq: Run) -> None:
    result = gptq(command[:-1] + "x")
    assert result.exit_code == 2
    assert "hint: did you mean" in result.stderr
    assert "did you mean --verbose?" in gptq(command, "--verbos").stderr
