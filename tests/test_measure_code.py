"""The counts of scripts/measure_code.py, beside counts by hand."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
SAMPLE = '''"""A docstring
of two lines."""

# a comment
import math


def many(a, *, b=None, **rest):  # code 2
    """Docstring."""
    if a and b or rest:  # 1 for if, 1 for and, 1 for or
        return [x for x in a if x if x > 1]  # 1 for for, 2 for if
    try:
        text = """a text
        of two lines"""
    except ValueError:  # 1
        return 1 if a else 2  # 1
    finally:  # 1
        del a
    return text  # 1 to begin with: 10 in all


class Few:
    def none(self, one, two):
        def inner():
            return {1: 2 for _ in one}  # 2

        return inner  # 1
'''


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "measure_code", ROOT / "scripts" / "measure_code.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "measure_code", module)
    spec.loader.exec_module(module)
    return module


def test_counts_of_a_file_equal_counts_by_hand(script: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "sample.py"
    file.write_text(SAMPLE + "# " + "x" * 99 + "\\n", encoding="utf-8")
    found = script.count_file(file)
    assert (found.files, found.code, found.long_lines) == (1, 17, 1)
    assert (found.comprehensions, found.conditionals) == (2, 1)
    assert sorted(found.complexities) == [1, 2, 10]
    assert found.complex_functions == 1


def test_parameters_exclude_self(script: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "sample.py"
    file.write_text(SAMPLE, encoding="utf-8")
    found = {function.name: script.n_parameters(function) for function in script.functions_of(file)}
    assert found == {"many": 3, "none": 2, "inner": 0}


def test_one_traced_run_stays_within_the_limits(script: ModuleType) -> None:
    """The limits of the sources are left to `make check`."""
    figures, notes = script.run_figures()
    over = {name: figure for name, figure in figures.items() if figure > script.LIMITS[name]}
    assert over == {}
    assert notes["calls"][0] == "quantize"
    assert notes["calls"][-1] == notes["frames"][-1] == script.COLUMN_LOOP
