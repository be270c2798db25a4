"""The program as a process: imports, pipes, full disks, closed streams and narrow terminals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from .processes import run_process, shell


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """Write a valid recipe."""
    path = tmp_path / "recipe.yaml"
    path.write_text("bits: 4\n", encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["--version"],
        ["quantize", "--help"],
        ["validate-config", "RECIPE"],
        ["quantize", "./none", "-b", "4"],
        ["quantize", "m", "-b", "5"],
    ],
)
def test_quick_commands_load_nothing_heavy(words: list[str], recipe: Path) -> None:
    names = {"RECIPE": str(recipe)}
    _, _, _, loaded = run_process([names.get(word, word) for word in words], {})
    assert set(loaded) <= {"huggingface_hub"}


def test_variables_of_the_user_override_our_defaults() -> None:
    names = ("OMP_WAIT_POLICY", "THP_MEM_ALLOC_ENABLE", "USE_HUB_KERNELS")
    found = json.loads(shell(f"unset {' '.join(names)}; $GPTQ env --json").stdout)["variables"]
    assert [found[name] for name in names] == ["PASSIVE", "1", "NO"]
    by_user = {"OMP_WAIT_POLICY": "ACTIVE", "THP_MEM_ALLOC_ENABLE": "0", "USE_HUB_KERNELS": "YES"}
    found = json.loads(shell("$GPTQ env --json", **by_user).stdout)["variables"]
    assert [found[name] for name in names] == ["ACTIVE", "0", "YES"]


def test_a_pipe_that_closes_early_is_no_failure(recipe: Path) -> None:
    found = shell(f"set -o pipefail; $GPTQ validate-config {recipe} | (exec <&-; sleep 0)")
    assert (found.returncode, found.stderr) == (0, "")


def test_a_full_disk_behind_stdout_is_a_failure_in_one_line(recipe: Path) -> None:
    found = shell(f"$GPTQ validate-config {recipe} > /dev/full")
    assert found.returncode == 1
    expected = "error[E_STDOUT]: cannot write the result to stdout: No space left on device\n"
    assert found.stderr == expected
    found = shell(f"$GPTQ validate-config {recipe}.none --json > /dev/full")
    assert found.returncode == 2
    assert "Traceback" not in found.stderr


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_closed_streams_do_not_matter(closed: str, recipe: Path) -> None:
    assert shell(f"$GPTQ validate-config {recipe} {closed}").returncode == 0
    assert shell(f"$GPTQ validate-config {recipe}.none --json {closed}").returncode == 2


def test_messages_for_a_closed_stderr_stay_off_stdout(recipe: Path) -> None:
    found = shell(f"$GPTQ validate-config {recipe}.none --json 2>&-")
    assert json.loads(found.stdout)["problems"][0]["code"] == "E_CFG_FILE"


@pytest.mark.parametrize(
    "environment", [{}, {"GITHUB_ACTIONS": "true"}, {"NO_COLOR": "1", "FORCE_COLOR": "1"}]
)
def test_pipes_get_no_terminal_codes(environment: dict[str, str], recipe: Path) -> None:
    for words in ("--help", "quantize --help", f"validate-config {recipe}", "quantise"):
        found = shell(f"$GPTQ {words}", **environment)
        assert "\x1b" not in found.stdout + found.stderr


def test_a_narrow_terminal_does_not_break_paths(tmp_path: Path) -> None:
    path = tmp_path / ("long-name-" * 9) / "none.yaml"
    found = shell(f"$GPTQ validate-config {path}", COLUMNS="40")
    assert f"cannot read the configuration {path}: No such file or directory\n" in found.stderr


def test_letters_outside_the_locale_are_escaped(tmp_path: Path) -> None:
    found = shell(
        f"$GPTQ validate-config {tmp_path}/é.yaml", PYTHONIOENCODING="ascii", PYTHONUTF8="0"
    )
    assert found.returncode == 2
    assert "\\xe9.yaml" in found.stderr
