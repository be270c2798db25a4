"""What the documents promise is what the program has."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from gptq_cli import __version__, errors
from gptq_cli.cli.app import COMMANDS
from gptq_cli.config.schema import QuantizeConfig

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
SOURCES = sorted((ROOT / "gptq_cli").rglob("*.py"))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_in_the_readme(command: str) -> None:
    assert f"gptq {command} " in README


def test_options_of_the_readme_exist() -> None:
    named = set(re.findall(r"`--([a-z-]+)", README))
    known = {field.replace("_", "-") for field in QuantizeConfig.model_fields}
    known |= {
        "asym",
        "config",
        "print-config",
        "overwrite",
        "json",
        "model",
        "baseline",
        "max-increase",
        "help",
        "full",
    }
    known |= {"base-model", "evaluation", "public", "card"}
    known |= {"dry-run", "layer", "text", "report", "verbose", "log-file"}
    known |= {"resume", "max-runtime", "allow-network-fs"}
    assert named <= known
    assert len(named) > 10


def test_files_and_targets_of_the_readme_exist() -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert set(re.findall(r"(?:^|`)make ([a-z-]+)", README, flags=re.MULTILINE)) <= set(targets)
    paths = re.findall(r"`((?:docs|scripts|configs|examples)/[\w./-]*)`", README)
    assert len(paths) > 4
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_exit_codes_of_the_readme_are_those_of_the_errors() -> None:
    documented = {int(code) for code in re.findall(r"^\| (\d+) \|", README, flags=re.MULTILINE)}
    classes = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    assert {kind.exit_code for kind in classes} | {0, 130, 143} == documented


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_is_one_idea_and_a_function_half_a_page(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 400
    functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
    # What is counted is the body: a signature that lists every option of a command is no code to follow.
    assert [f.name for f in functions if f.end_lineno and f.end_lineno - f.body[0].lineno >= 50] == []


def test_the_changelog_knows_the_version_or_what_comes() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert f"## {__version__}" in changelog or "## Unreleased" in changelog
