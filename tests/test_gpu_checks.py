"""The GPU checks, as far as they run without one: every part starts and writes its own figures."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "scripts" / "gpu_checks.sh"
RUNS = ["llama-3-8b", "best", "qwen3-30b-a3b", "capped", "llama-3-70b"]
PARTS = {
    "1": ["env", "quality", "tests", "engine", *RUNS, "measure"],
    "2": ["env", "quality", "tests", "llama-3-8b", "best"],
}
DIGEST_LINES, DIGEST_CHARACTERS = 60, 12_000


def checks(*arguments: str, python: str = sys.executable) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": python}
    return subprocess.run(
        [SCRIPT, *arguments], env=environment, capture_output=True, text=True, check=False
    )


def results(folder: Path) -> Path:
    """Return the folder with the results of a call, unpacked from the one file with all of them."""
    with tarfile.open(folder / "results.tar.gz") as packed:
        packed.extractall(folder, filter="data")
    return folder / "results"


@pytest.mark.parametrize("call", PARTS)
def test_failed_part_is_reported_and_the_others_run(call: str, tmp_path: Path) -> None:
    failing = PARTS[call][-1]
    python = tmp_path / "python"
    digest = f'*gpu_digest*) exec {sys.executable} "$@";;'
    fails = f"*/{failing}.json*) exit 7;;"
    python.write_text(f'#!/bin/sh\ncase "$*" in {digest} {fails} esac\necho "$@"\n')
    python.chmod(0o755)
    found = checks(call, str(tmp_path), python=str(python))
    assert found.returncode == 1
    listed = (results(tmp_path) / "parts.txt").read_text()
    told = re.findall(r"^(\S+): exit code (\d+) after", listed, flags=re.MULTILINE)
    expected = dict.fromkeys(PARTS[call], "0") | {failing: "7"}
    assert told == list(expected.items())
    assert found.stdout.endswith((tmp_path / "digest.txt").read_text())


def test_a_second_call_repeats_the_parts_that_are_named(tmp_path: Path) -> None:
    found = checks("2", str(tmp_path), "env", "nothing", "--tiny")
    assert found.returncode == 1
    assert re.match("env: exit code 0", (results(tmp_path) / "parts.txt").read_text())
    assert "no part nothing" in found.stderr


def test_calls_end_after_eight_and_five_minutes() -> None:
    limits = re.findall(r"^  ([12])\) seconds=(\d+)", SCRIPT.read_text(), flags=re.MULTILINE)
    assert dict(limits) == {"1": "480", "2": "300"}


def test_the_digest_stays_within_sixty_lines(tmp_path: Path) -> None:
    failures = [f"FAILED tests/test_{number}.py - {'long ' * 99}" for number in range(99)]
    (tmp_path / "tests.log").write_text("\n".join([*failures, "99 failed"]))
    (tmp_path / "parts.txt").write_text("tests: exit code 1 after 5 s\n" * 99)
    (tmp_path / "quality.json").write_text('{"a check": {"holds": false, "kls": [0.123456, 1]}}')
    (tmp_path / "best.json").write_text('{"cut off')
    script = ROOT / "scripts" / "gpu_digest.py"
    command = [sys.executable, str(script), str(tmp_path)]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert len(told.splitlines()) == DIGEST_LINES
    assert len(told) < DIGEST_CHARACTERS
    (tmp_path / "parts.txt").write_text("tests: exit code 1 after 5 s\n")
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "quality: a check: FAILS {kls: [0.123, 1]}" in told


def test_gpu_tests_need_no_development_package_but_pytest(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(f"""#!{sys.executable}
import sys
class Absent:
    def find_spec(self, name, *_):
        if name.split(".")[0] in ("hypothesis", "datasets", "jsonschema", "matplotlib", "psutil"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
if sys.argv[1:3] == ["-m", "pytest"]:
    import pytest
    options = ["--collect-only", "-p", "no:hypothesispytest", "-p", "no:xdist"]
    sys.exit(pytest.main([*sys.argv[3:], *options]))
""")
    python.chmod(0o755)
    checks("2", str(tmp_path), "tests", python=str(python))
    found = results(tmp_path)
    collected = re.search(r"(\d+)/\d+ tests collected", (found / "tests.log").read_text())
    assert (found / "parts.txt").read_text().startswith("tests: exit code 0 ")
    assert collected is not None
    assert int(collected[1]) > 50


@pytest.mark.parametrize("arguments", [("1", "out", "--tidy"), ("3", "out")])
def test_unknown_arguments_are_refused(arguments: tuple[str, ...]) -> None:
    assert checks(*arguments).returncode == 2


@pytest.mark.parametrize("arguments", [(), ("1",)])
def test_too_few_arguments_show_a_usage_line(arguments: tuple[str, ...]) -> None:
    found = checks(*arguments)
    assert found.returncode == 2
    assert found.stderr.startswith("usage: scripts/gpu_checks.sh 1|2 OUT [PART ...]")


def test_environment_part_fails_if_python_has_no_torch(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')  # without site-packages
    python.chmod(0o755)
    found = checks("2", str(tmp_path), "env", python=str(python))
    assert found.returncode == 1
    assert "env: exit code 1" in found.stdout
    assert "has no torch; set PYTHON to a Python that has it" in found.stdout


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rehearse the first call with tiny shapes on a CPU; return the folder of its results."""
    folder = tmp_path_factory.mktemp("first")
    found = checks("1", str(folder), "--device", "cpu", "--tiny")
    assert found.returncode == 0, found.stdout
    return results(folder)


def figures(folder: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / f"{name}.json").read_text())
    return found


@pytest.mark.slow
def test_rehearsal_measures_each_step_of_a_block(rehearsed: Path) -> None:
    engine = figures(rehearsed, "engine")
    assert all(row["seconds"] > 0 for row in engine["block"].values())
    assert engine["next_bottleneck"] in engine["block"]


@pytest.mark.slow
def test_rehearsal_compares_kernels_with_the_reference(rehearsed: Path) -> None:
    measured = figures(rehearsed, "measure")
    assert measured["solver"]["codes_that_differ"] == 0
    assert measured["factorisation"]["64"]["relative_difference"] < 1e-5


@pytest.mark.slow
def test_rehearsal_checks_quality_and_bytes(rehearsed: Path) -> None:
    checked = figures(rehearsed, "quality")
    assert len(checked) == 7
    assert all(check["holds"] for check in checked.values())


@pytest.mark.slow
def test_rehearsal_finishes_tiny_runs_and_traces_one(rehearsed: Path) -> None:
    for name in RUNS:
        run = figures(rehearsed, name)
        assert run["finished"], name
        assert len(run["block_seconds"]) == run["blocks"] == 2
        assert run["relative_error"] < run["rtn_relative_error"]
    assert figures(rehearsed, "best")["arguments"]["preset"] == "best"
    assert "aten::" in (rehearsed / "llama-3-8b-trace.json.txt").read_text()
    assert (rehearsed / "llama-3-8b-trace.json.gz").stat().st_size > 1000
