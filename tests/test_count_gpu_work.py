"""The work that a block asks of a GPU, counted without one; a change that adds to it fails here."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
pytestmark = pytest.mark.skipif(
    torch.version.cuda is not None, reason="torch has a device of its own"
)
pytest.importorskip("triton")
TEXT = {"nsamples": 4, "seqlen": 64, "batch_size": 2, "group_size": 32}
TOKENS = 4 * 64
# Another thread has these parts. It may work on what the block before has left, or not come so far.
LATE = {"copy", "pack"}


@pytest.fixture(scope="module")
def script() -> ModuleType:
    sys.path.insert(0, str(SCRIPTS))
    try:
        return import_module("count_gpu_work")
    finally:
        sys.path.remove(str(SCRIPTS))


def counted(script: ModuleType, shape: str = "tiny", **settings: Any) -> dict[str, Any]:
    found: dict[str, Any] = script.count(script.SHAPES[shape], script.Rates(), **(TEXT | settings))
    return found


# The most launches of each part, and waits of the program; a change that needs fewer may lower them
MOST: dict[tuple[str, str], dict[str, tuple[int, int]]] = {
    ("tiny", "gptq"): {
        "columns": (166, 8),
        "copy": (37, 0),
        "errors": (631, 8),
        "factor": (180, 8),
        "forward": (76, 0),
        "hessian": (84, 0),
        "pack": (56, 0),
        "put back": (63, 0),
    },
    ("tiny", "balanced"): {
        "columns": (120, 8),
        "copy": (37, 0),
        "errors": (631, 8),
        "factor": (160, 8),
        "forward": (76, 0),
        "hessian": (244, 0),
        "pack": (56, 0),
        "put back": (63, 0),
        "refine": (532, 0),
        "search": (156, 4),
    },
    ("tiny", "best"): {
        "columns": (116, 8),
        "copy": (37, 0),
        "errors": (662, 8),
        "factor": (160, 8),
        "follow": (462, 0),
        "forward": (152, 0),
        "hessian": (260, 0),
        "pack": (56, 0),
        "put back": (77, 7),
        "refine": (528, 0),
        "search": (156, 4),
        "shift": (32, 0),
    },
    ("tiny-moe", "balanced"): {
        "columns": (116, 8),
        "copy": (505, 0),
        "errors": (566, 8),
        "factor": (162, 8),
        "forward": (558, 3),
        "hessian": (1986, 0),
        "pack": (800, 0),
        "put back": (60, 0),
        "refine": (378, 0),
        "search": (156, 4),
    },
}


@pytest.fixture(scope="module")
def balanced(script: ModuleType) -> dict[str, Any]:
    return counted(script, preset="balanced")


def excess(found: dict[str, Any], most: dict[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    """Return launches and waits of the parts that have more of them than `most` allows."""
    over = {}
    for name, part in found["parts"].items():
        launches, waits = most.get(name, (0, 0))
        if name in LATE:
            launches *= 2
        if part["launches"] > launches or part["waits"] > waits:
            over[name] = (part["launches"], part["waits"])
    return over


def test_a_block_launches_and_waits_no_more_than_before(balanced: dict[str, Any]) -> None:
    assert excess(balanced, MOST["tiny", "balanced"]) == {}


@pytest.mark.parametrize(
    ("shape", "preset"), [case for case in MOST if case != ("tiny", "balanced")]
)
def test_other_presets_and_experts_launch_and_wait_no_more(
    shape: str, preset: str, script: ModuleType
) -> None:
    assert excess(counted(script, shape, preset=preset), MOST[shape, preset]) == {}


def test_products_are_those_of_each_token_with_each_weight(
    script: ModuleType, balanced: dict[str, Any]
) -> None:
    shape = script.SHAPES["tiny"]
    weights, squares, attended = 0, 0, 0
    for in_features, outs, _ in shape.inputs:
        weights += in_features * sum(outs)
        squares += in_features**2
    for position in range(64):
        attended += 4 * (position + 1) * 2 * shape.heads * shape.head_dim
    forward = balanced["parts"]["forward"]["products"]
    assert forward == pytest.approx(2 * TOKENS * weights + 2 * attended, rel=0.01)
    hessian = balanced["parts"]["hessian"]["products"]
    # only blocks on and above the diagonal: one of 128 columns, or two
    assert 2 * TOKENS * squares / 2 < hessian <= 2 * TOKENS * squares


def test_the_table_says_that_its_time_is_estimated(
    script: ModuleType, balanced: dict[str, Any]
) -> None:
    *_, last = script.table(balanced)
    assert "s (estimated from public rates of an H100, not measured): " in last
