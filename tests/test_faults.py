"""Faults of users: each gets a short refusal with code, hint and exit code, and no leftovers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from gptq_cli.cli.app import app
from tests.families import save_model, texts
from tests.faults import CASES, Case


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model of three shards and a text."""
    folder = tmp_path_factory.mktemp("sound")
    save_model(folder / "model", num_hidden_layers=2, max_shard_size="280KB")
    assert len(list((folder / "model").glob("*.safetensors"))) == 3
    (folder / "text.txt").write_text(texts(2_000)[0])
    return folder


@pytest.mark.parametrize("case", CASES, ids=str)
def test_fault_is_refused_in_a_few_lines_without_leftovers(
    case: Case, sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "run"
    shutil.copytree(sound, folder)
    words = case.arrange(folder)
    before = sorted(folder.rglob("*"))
    human = CliRunner().invoke(
        app, [*words, "--quiet"] if words[0] in ("quantize", "eval-ppl") else words
    )
    assert human.exit_code == case.exit_code, human.output
    assert human.stdout == ""
    lines = [line for line in human.stderr.splitlines() if line]
    if case.begun:  # a run that had begun says first how to go on with what it keeps
        assert ".out.gptq-work" in lines.pop(0)
    assert lines[0].startswith(f"error[{case.code}]: ")
    assert case.message in human.stderr
    assert "Traceback" not in human.stderr
    assert "\x1b" not in human.stderr
    hints = [line for line in lines if line.startswith("hint: ")]
    assert case.hint in "".join(hints)
    left = set(folder.rglob("*")) - set(before)
    assert not {path for path in left if not (case.begun and ".out.gptq-work" in path.parts)}
    data = json.loads(CliRunner().invoke(app, [*words, "--json"]).stdout)
    assert (data["exit_code"], data["problems"][0]["code"]) == (case.exit_code, case.code)
    assert len(lines) <= (4 if len(data["problems"]) == 1 else 3 * len(data["problems"]) + 1)


def test_run_without_a_fault_works(sound: Path, tmp_path: Path) -> None:
    from tests.faults import run

    folder = tmp_path / "run"
    shutil.copytree(sound, folder)
    assert CliRunner().invoke(app, [*run(folder), "--quiet"]).exit_code == 0


# Rows about numbers, devices, the Hub and secrets: tests of those parts see them.
BY_OTHER_TESTS = {6, 21, 33, 38, *range(58, 62), *range(64, 71), 72, 75}
NOT_HERE = {
    22: "calibration reads texts, so a chat template is never applied",
    77: "there are no evaluation tasks with code",
}


def test_each_row_of_the_catalogue_has_a_test_or_a_reason() -> None:
    rows = {*range(1, 39), *range(58, 62), *range(64, 78), 82}
    assert rows == {case.row for case in CASES} | BY_OTHER_TESTS | set(NOT_HERE)
