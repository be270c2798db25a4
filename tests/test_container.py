"""The image is built of files that are there, and its words are those of the documents."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

from gptq_cli import __version__

ROOT = Path(__file__).resolve().parents[1]
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
PAGE = (ROOT / "docs/how-to/container.md").read_text(encoding="utf-8")
TARGETS = ("cpu", "cuda")


def instructions() -> list[tuple[str, str]]:
    """Return the instructions of the Dockerfile with their words, without comments."""
    lines = [line for line in DOCKERFILE.splitlines() if line and not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in joined.splitlines()]


def copied() -> list[str]:
    """Return the files and directories that come from the sources."""
    found: list[str] = []
    for name, words in instructions():
        if name == "COPY":
            found += words.split()[:-1]
    return found


def test_the_image_gets_all_that_the_wheel_is_built_of(tmp_path: Path) -> None:
    for name in copied():
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tmp_path / name)
        else:
            shutil.copy(ROOT / name, tmp_path)
    project = (tmp_path / "pyproject.toml").read_text(encoding="utf-8")
    named = re.findall(r'^(?:readme|path) = "(.+)"', project, flags=re.MULTILINE)
    named += re.findall(r'^license-files = \["(.+)"\]', project, flags=re.MULTILINE)
    assert len(named) == 3
    assert [name for name in named if not (tmp_path / name).exists()] == []
    code = "import gptq_cli; print(gptq_cli.__file__, gptq_cli.__version__)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [str(tmp_path / "gptq_cli/__init__.py"), __version__]


def test_docker_sends_what_the_image_copies_and_no_more() -> None:
    rules = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert rules[0] == "*"
    sent = [rule.removeprefix("!") for rule in rules if rule.startswith("!")]
    assert sorted(sent) == sorted(copied())
    assert any(fnmatch("gptq_cli/cli/__pycache__", rule) for rule in rules[1:])


@pytest.mark.parametrize("target", TARGETS)
def test_a_target_starts_gptq_in_the_mounted_directory(target: str) -> None:
    bases = dict(reversed(words.split(" AS ")) for name, words in instructions() if name == "FROM")
    assert bases[target] == "base"
    assert ("WORKDIR", "/data") in instructions()
    assert ("ENTRYPOINT", '["gptq"]') in instructions()
    head = DOCKERFILE.partition("\n\n")[0]
    shown = re.findall(r"docker (?:build|run) .+", head)
    assert len(shown) == 4
    assert [command for command in shown if command not in PAGE] == []
    assert any(f"--target {target} " in command for command in shown)
