"""Scripts that no test runs still import names that exist."""

from __future__ import annotations

import ast
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
OWN = ("gptq_cli", "tests")


def missing_names(script: Path) -> list[str]:
    """Return the names of this source tree that a script imports, but that are not there."""
    missing = []
    for node in ast.walk(ast.parse(script.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom) or node.module is None:
            continue
        if node.module.partition(".")[0] not in OWN:
            continue
        if find_spec(node.module) is None:
            missing.append(node.module)
            continue
        module = import_module(node.module)
        for alias in node.names:
            submodule = f"{node.module}.{alias.name}"
            is_package = hasattr(module, "__path__")
            if not hasattr(module, alias.name) and not (is_package and find_spec(submodule)):
                missing.append(submodule)
    return missing


@pytest.mark.parametrize("script", sorted(SCRIPTS.glob("*.py")), ids=lambda path: path.stem)
def test_names_that_a_script_imports_exist(script: Path) -> None:
    assert missing_names(script) == []


def test_a_name_that_does_not_exist_is_found(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from gptq_cli.errors import GptqError, Absent\nfrom gptq_cli import solver\n"
    )
    assert missing_names(script) == ["gptq_cli.errors.Absent"]
