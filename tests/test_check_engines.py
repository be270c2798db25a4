"""scripts/check_engines.py on planted archives: what changed is reported, and what is missing."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "scripts" / "check_engines.py"
SOURCE = "GROUPS = [-1, 32]\nif desc_act:\n    raise ValueError\n"
FACTS = [
    {
        "package": "wheel-engine",
        "version": "1.0",
        "facts": [
            {"file": "engine/a.py", "has": r"^GROUPS = \[-1, 32\]$", "means": "two group sizes"},
            {"file": "engine/*.py", "lacks": "dynamic", "means": "it reads no rules"},
        ],
    },
    {
        "package": "source-engine",
        "version": "2.0",
        "sdist": True,
        "facts": [
            {"file": "*/b.py", "has": r"desc_act:\s+raise", "means": "it refuses desc_act"},
        ],
    },
]


@pytest.fixture
def archives(tmp_path: Path) -> Path:
    """Return a folder with a wheel and a source archive in which all facts hold."""
    write_wheel(tmp_path, SOURCE)
    (tmp_path / "source-engine").mkdir()
    (tmp_path / "b.py").write_text(SOURCE)
    with tarfile.open(tmp_path / "source-engine" / "source_engine-2.1.tar.gz", "w:gz") as sources:
        sources.add(tmp_path / "b.py", "source_engine-2.1/engine/b.py")
    return tmp_path


def write_wheel(folder: Path, source: str, name: str = "engine/a.py") -> None:
    (folder / "wheel-engine").mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / "wheel-engine" / "wheel_engine-1.1-py3-none-any.whl", "w") as new:
        new.writestr(name, source)


def check(archives: Path, *options: str) -> subprocess.CompletedProcess[str]:
    facts = archives / "facts.yaml"
    facts.write_text(yaml.safe_dump(FACTS))
    command = [sys.executable, str(SCRIPT), "--facts", str(facts), "--archives", str(archives)]
    return subprocess.run([*command, *options], capture_output=True, text=True, check=False)


def states(done: subprocess.CompletedProcess[str]) -> list[str]:
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return [finding["state"] for finding in found]


def test_facts_that_hold_are_counted_with_the_versions(archives: Path) -> None:
    done = check(archives)
    assert done.returncode == 0
    assert done.stdout.splitlines() == [
        "wheel-engine 1.1 (facts found in 1.0): 2 of 2 facts hold",
        "source-engine 2.1 (facts found in 2.0): 1 of 1 facts hold",
    ]


def test_a_changed_fact_is_shown_with_what_the_table_says(archives: Path) -> None:
    write_wheel(archives, SOURCE.replace("32", "32, 64") + "dynamic = {}\n")
    done = check(archives)
    assert done.returncode == 1
    assert "wheel-engine 1.1 (facts found in 1.0): 0 of 2 facts hold" in done.stdout
    assert "  changed: engine/a.py" in done.stdout
    assert "    the table says: two group sizes" in done.stdout
    assert states(check(archives, "--json")) == ["changed", "changed", "holds"]


def test_a_file_that_moved_is_missing_not_unchanged(archives: Path) -> None:
    write_wheel(archives, SOURCE, "other/a.py")
    done = check(archives, "--json")
    assert done.returncode == 1
    assert states(done) == ["missing", "missing", "holds"]


def test_a_package_without_archive_gives_exit_code_2(archives: Path) -> None:
    (archives / "wheel-engine" / "wheel_engine-1.1-py3-none-any.whl").unlink()
    done = check(archives, "--json")
    assert done.returncode == 2
    assert "no archive of wheel-engine" in done.stderr
    assert states(done) == ["holds"]


def test_facts_about_engines_are_complete_and_compile() -> None:
    packages = yaml.safe_load((ROOT / "scripts" / "engine_facts.yaml").read_text())
    facts = [fact for package in packages for fact in package["facts"]]
    incomplete = [fact for fact in facts if len({"has", "lacks"} & fact.keys()) != 1]
    assert len(facts) > 30
    assert incomplete == []
    assert all(fact["means"] and fact["file"] for fact in facts)
