"""The GPU checks, as far as they run without one: every part starts and writes its own figures."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "scripts" / "gpu_checks.sh"
PARTS = {
    "1": ["tests", "measure", "engine", "llama-3-8b"],
    "2": ["capped", "llama-3-70b", "qwen3-30b-a3b", "best", "profile"],
}


def checks(*arguments: str, python: str = sys.executable) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": python}
    return subprocess.run(
        [SCRIPT, *arguments], env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("call", PARTS)
def test_failed_part_is_reported_and_the_others_run(call: str, tmp_path: Path) -> None:
    failing = PARTS[call][1]
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "$@"\ncase "$*" in *{failing}*) exit 7;; esac\n')
    python.chmod(0o755)
    found = checks(call, str(tmp_path), python=str(python))
    assert found.returncode == 1
    listed = (tmp_path / "parts.txt").read_text()
    told = re.findall(r"^(\S+): exit code (\d+) after", listed, flags=re.MULTILINE)
    expected = dict.fromkeys(PARTS[call], "0") | {failing: "7"}
    assert told == list(expected.items())
    assert all((tmp_path / f"{name}.log").read_text() for name in PARTS[call])


@pytest.mark.parametrize("call", PARTS)
def test_time_limits_of_a_call_sum_to_under_ten_minutes(call: str) -> None:
    lines = re.findall(r"^  (?:part|run) (\S+) (\d+) ", SCRIPT.read_text(), flags=re.MULTILINE)
    limits = {name: int(seconds) for name, seconds in lines}
    assert set(limits) == {*PARTS["1"], *PARTS["2"]}
    assert sum(limits[name] for name in PARTS[call]) <= 570


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
    checks("1", str(tmp_path), python=str(python))
    collected = re.search(r"(\d+)/\d+ tests collected", (tmp_path / "tests.log").read_text())
    assert (tmp_path / "parts.txt").read_text().startswith("tests: exit code 0 ")
    assert collected is not None
    assert int(collected[1]) > 50


@pytest.mark.parametrize("arguments", [(), ("1", "--tidy")])
def test_unknown_arguments_are_refused(arguments: tuple[str, ...]) -> None:
    assert checks(*arguments).returncode in (1, 2)


@pytest.fixture(scope="module")
def first_call(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Run the first call with tiny shapes on a CPU; return the figures of each part."""
    folder = tmp_path_factory.mktemp("first")
    found = checks("1", str(folder), "--device", "cpu", "--tiny")
    assert found.returncode == 0, found.stdout
    names = ("engine", "measure", "llama-3-8b")
    return {name: json.loads((folder / f"{name}.json").read_text()) for name in names}


@pytest.mark.slow
def test_first_call_measures_each_step_of_a_block(first_call: dict[str, Any]) -> None:
    engine = first_call["engine"]
    assert all(row["seconds"] > 0 for row in engine["block"].values())
    assert engine["next_bottleneck"] in engine["block"]


@pytest.mark.slow
def test_first_call_compares_kernels_with_the_reference(first_call: dict[str, Any]) -> None:
    measured = first_call["measure"]
    assert measured["solver"]["codes_that_differ"] == 0
    assert measured["factorisation"]["64"]["relative_difference"] < 1e-5


@pytest.mark.slow
def test_first_call_finishes_a_tiny_run(first_call: dict[str, Any]) -> None:
    run = first_call["llama-3-8b"]
    assert run["finished"]
    assert len(run["block_seconds"]) == run["blocks"] == 2
    assert run["relative_error"] < run["rtn_relative_error"]


@pytest.mark.slow
def test_second_call_measures_tiny_runs_on_a_cpu(tmp_path: Path) -> None:
    found = checks("2", str(tmp_path), "--device", "cpu", "--tiny")
    runs = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in PARTS["2"]}
    told = dict(re.findall(r"^(\S+): exit code (\d+)", found.stdout, flags=re.MULTILINE))
    for name, run in runs.items():
        assert run["finished"] == (told[name] == "0"), found.stdout
        assert run["finished"] or run["error"]
    assert all(runs[name]["finished"] for name in ("capped", "llama-3-70b", "best", "profile"))
    assert runs["best"]["arguments"]["preset"] == "best"
    assert "aten::" in (tmp_path / "profile.txt").read_text()
