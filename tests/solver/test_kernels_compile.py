"""Every kernel compiles for a GPU with the sizes of its launches and keeps its data in registers.

Compiling needs no GPU: Triton brings the assembler along.
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
triton = pytest.importorskip("triton")
SHARED_BYTES = 48 * 1024  # of a program, on any device


@pytest.fixture(scope="module")
def script() -> ModuleType:
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        return import_module("ptxas_table")
    finally:
        sys.path.remove(str(ROOT / "scripts"))


NAMES = [
    "round columns",
    "fit codes",
    "fit scales",
    "find sym grids",
    "find asym grids",
    "best candidate",
    "dequantize",
]


# Each kernel compiles for one target and each target gets one kernel; the other pairs are slow.
TARGETS = [80, 89, 90, 100]
PAIRS = []
for _number, _name in enumerate(NAMES):
    for _target in TARGETS:
        _marks = pytest.mark.slow
        if _target == TARGETS[_number % 4]:
            _marks = ()
        PAIRS.append(pytest.param(_name, _target, marks=_marks))


@pytest.mark.parametrize(("name", "target"), PAIRS)
def test_kernels_compile_for_a_gpu_and_spill_nothing(
    name: str, target: int, script: ModuleType
) -> None:
    use = script.usage(name, target)
    assert use.spilled == 0
    assert 0 < use.registers * use.warps * 32 <= 65536 // 2  # so that two programs fit
    assert use.shared <= SHARED_BYTES


def test_the_table_has_each_kernel(script: ModuleType) -> None:
    from gptq_cli.solver import triton_kernels

    functions = {name for name in vars(triton_kernels) if name.endswith("_kernel")}
    assert {kernel.function for kernel in script.KERNELS.values()} == functions
    assert list(script.KERNELS) == NAMES
    committed = (ROOT / "docs" / "benchmarks" / "README.md").read_text(encoding="utf-8")
    rows = [line.split(" | ")[0] for line in committed.splitlines()]
    assert [name for name in NAMES if f"| {name}" not in rows] == []


def told(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: str, **changed: int
) -> int:
    """Return the exit code of the script for kernels that take little, or as much as `changed`."""
    takes = {"warps": 4, "registers": 64, "spilled": 0, "shared": 512} | changed

    def usage(kernel: str, target: int) -> Any:
        return script.Usage(kernel, target, **takes)

    monkeypatch.setattr(script, "usage", usage)
    monkeypatch.setattr(sys, "argv", ["ptxas_table.py", *arguments])
    code: int = script.main()
    return code


def test_the_table_lists_registers_spills_and_shared_memory(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert told(script, monkeypatch, "--markdown", "--targets", "90", "120") == 0
    header, _, first, *_ = capsys.readouterr().out.splitlines()
    assert header == "| kernel | sm_90 (H100) | sm_120 (other) |"
    assert first == "| round columns | 64 / 0 / 512 | 64 / 0 / 512 |"


@pytest.mark.parametrize("changed", [{"spilled": 8}, {"registers": 255, "warps": 8}])
def test_a_spill_or_too_many_registers_are_an_error(
    changed: dict[str, int],
    script: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert told(script, monkeypatch, "--targets", "80", **changed) == 1
    assert "error: does not fit: round columns" in capsys.readouterr().err
