"""Faults of users: each gets a short refusal with code, hint and exit code, and no leftovers."""

from __future__ import annotations

import json
import shutil
from contextlib import chdir
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from gptq_cli.cli.app import app
from tests.families import save_model, texts
from tests.faults import CASES, Case, run


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a folder with a model of three shards and a text."""
    folder = tmp_path_factory.mktemp("sound")
    save_model(folder / "model", num_hidden_layers=2, max_shard_size="280KB")
    assert len(list((folder / "model").glob("*.safetensors"))) == 3
    (folder / "text.txt").write_text(texts(2_000)[0])
    return folder


@dataclass(frozen=True)
class Refusal:
    """What a case printed, as text and as JSON, and the files that were not there before."""

    case: Case
    human: Result
    data: dict[str, Any]
    new_files: set[Path]

    @property
    def lines(self) -> list[str]:
        """The lines on stderr, without the first of a run that had begun: how to resume it."""
        lines = [line for line in self.human.stderr.splitlines() if line]
        return lines[1:] if self.case.begun else lines


@pytest.fixture(scope="module", params=CASES, ids=str)
def refusal(
    request: pytest.FixtureRequest, sound: Path, tmp_path_factory: pytest.TempPathFactory
) -> Refusal:
    """Run the command of one case, as a user and with --json."""
    case: Case = request.param
    directory = tmp_path_factory.mktemp("fault")
    folder = directory / "run"
    shutil.copytree(sound, folder)
    with chdir(directory):
        words = case.arrange(folder)
        before = set(folder.rglob("*"))
        quiet = ["--quiet"] if words[0] in ("quantize", "eval-ppl") else []
        human = CliRunner().invoke(app, [*words, *quiet])
        new_files = set(folder.rglob("*")) - before
        data = json.loads(CliRunner().invoke(app, [*words, "--json"]).stdout)
    return Refusal(case, human, data, new_files)


def test_fault_gets_its_code_message_and_hint(refusal: Refusal) -> None:
    case, human = refusal.case, refusal.human
    assert human.exit_code == case.exit_code, human.output
    assert refusal.lines[0].startswith(f"error[{case.code}]: ")
    assert case.message in human.stderr
    hints = [line for line in refusal.lines if line.startswith("hint: ")]
    assert case.hint in "".join(hints)


def test_json_of_a_fault_has_its_codes(refusal: Refusal) -> None:
    case, data = refusal.case, refusal.data
    assert (data["exit_code"], data["problems"][0]["code"]) == (case.exit_code, case.code)


def test_refusal_of_a_fault_is_short_plain_text(refusal: Refusal) -> None:
    human, n_problems = refusal.human, len(refusal.data["problems"])
    assert human.stdout == ""
    assert "Traceback" not in human.stderr
    assert "\x1b" not in human.stderr
    # message, place, line, caret and hint of each, and the number of several
    most = 5 * n_problems + (n_problems > 1)
    assert len(refusal.lines) <= most


def test_fault_leaves_only_the_work_of_a_begun_run(refusal: Refusal) -> None:
    if not refusal.case.begun:
        assert not refusal.new_files
        return
    assert not [path for path in refusal.new_files if ".out.gptq-work" not in path.parts]
    first = next(line for line in refusal.human.stderr.splitlines() if line)
    assert ".out.gptq-work" in first


def test_run_without_a_fault_works(sound: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(sound, folder)
    assert CliRunner().invoke(app, [*run(folder), "--quiet"]).exit_code == 0


# Rows about numbers, devices, the Hub and secrets: the tests of these parts cover them.
BY_OTHER_TESTS = {6, 21, 33, 38, *range(58, 62), *range(64, 71), 72, 75}
NOT_HERE = {
    22: "calibration reads texts, so a chat template is never applied",
    77: "there are no evaluation tasks with code",
}


def test_each_row_of_the_catalogue_has_a_test_or_a_reason() -> None:
    rows = {*range(1, 39), *range(58, 62), *range(64, 78), 82}
    assert rows == {case.row for case in CASES} | BY_OTHER_TESTS | set(NOT_HERE)
