"""The work that a block asks of a GPU, counted without one; a change that adds to it fails here."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from gptq_cli.config.schema import QuantizeConfig
from tests.counting_gpu import counting_gpu

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
pytestmark = pytest.mark.skipif(
    torch.version.cuda is not None, reason="torch has a device of its own"
)
pytest.importorskip("triton")
TEXT = {"nsamples": 4, "seqlen": 64, "batch_size": 2, "group_size": 32}
TOKENS = 4 * 64
# Linears whose input is that of one before them
SHARE_AN_INPUT = ("k_proj.weight", "v_proj.weight", "up_proj.weight", "kv_a_proj_with_mqa.weight")
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
    found: dict[str, Any] = script.count(script.SHAPES[shape], script.H100, **(TEXT | settings))
    return found


# The most launches of each part, and waits of the program; a change that needs fewer may lower them
MOST: dict[tuple[str, str], dict[str, tuple[int, int]]] = {
    ("tiny", "gptq"): {
        "columns": (166, 8),
        "copy": (37, 0),
        "errors": (631, 8),
        "factor": (180, 8),
        "forward": (76, 0),
        "hessian": (44, 0),
        "pack": (56, 0),
        "put back": (63, 0),
    },
    ("tiny", "balanced"): {
        "columns": (120, 8),
        "copy": (37, 0),
        "errors": (631, 8),
        "factor": (160, 8),
        "forward": (76, 0),
        "hessian": (140, 0),
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
        "follow": (309, 0),
        "forward": (152, 0),
        "hessian": (216, 0),
        "pack": (56, 0),
        "put back": (71, 4),
        "refine": (528, 0),
        "search": (156, 4),
        "shift": (48, 0),
    },
    ("tiny", "max"): {
        "columns": (938, 46),
        "copy": (56, 11),
        "errors": (812, 14),
        "factor": (440, 22),
        "follow": (288, 0),
        "forward": (152, 0),
        "hessian": (280, 0),
        "pack": (56, 0),
        "put back": (71, 4),
        "refine": (3298, 0),
        "rows": (2420, 14),
        "search": (273, 7),
        "shift": (48, 0),
    },
    ("tiny-moe", "balanced"): {
        "columns": (116, 8),
        "copy": (505, 0),
        "errors": (554, 8),
        "factor": (162, 8),
        "forward": (180, 3),
        "hessian": (320, 0),
        "pack": (54, 0),
        "put back": (60, 0),
        "refine": (378, 0),
        "search": (156, 4),
    },
    ("tiny-moe", "best"): {
        "columns": (112, 8),
        "copy": (505, 0),
        "errors": (568, 8),
        "factor": (162, 8),
        "follow": (268, 0),
        "forward": (354, 5),
        "hessian": (362, 0),
        "pack": (54, 0),
        "put back": (70, 4),
        "refine": (374, 0),
        "search": (156, 4),
        "shift": (280, 0),
    },
}


def test_a_gather_reads_as_much_as_it_writes() -> None:
    moved: list[int] = []
    with counting_gpu(10**9) as gpu:
        table, rows = torch.zeros(1000, 8, device="cuda:0"), torch.arange(5, device="cuda:0")
        gpu.on_operation = lambda operation: moved.append(operation.moved)
        table[rows]
        table.index_select(0, rows)
        torch.zeros(2, 8, device="cuda:0")[rows]
    of_rows = 5 * 8 * 4
    some = 2 * of_rows + 5 * 8
    assert [moved[0], moved[1], moved[3]] == [some, some, 2 * 8 * 4 + of_rows + 5 * 8]


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
    ("shape", "preset"),
    [
        ("tiny", "gptq"),
        ("tiny", "best"),
        pytest.param("tiny", "max", marks=pytest.mark.slow),
        ("tiny-moe", "balanced"),
        ("tiny-moe", "best"),
    ],
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


def test_no_part_takes_less_than_its_floor(script: ModuleType, balanced: dict[str, Any]) -> None:
    best = counted(script, preset="best")
    for found in (balanced, best):
        parts = found["parts"]
        assert all(part["seconds"] >= part["floor_seconds"] for part in parts.values())
        assert all(part["floor_seconds"] > 0 for part in parts.values())
        assert found["block_seconds"] > found["floor_seconds"]
    assert {"shift", "follow"} == best["parts"].keys() - balanced["parts"].keys()


def one_rate(script: ModuleType, name: str) -> Any:
    """Return rates at which only one kind of work takes time: a second for each unit."""
    kinds = ("bfloat16", "memory", "column_rows", "candidates", "pinned_copy")
    return replace(script.H100, **(dict.fromkeys(kinds, math.inf) | {name: 1.0, "float32": 0.0}))


def floors_of(script: ModuleType, shape: str, preset: str, rate: str) -> dict[str, float]:
    """Return the floors of a block of 256 tokens if only one kind of work takes time."""
    config = QuantizeConfig(bits=4, preset=preset, group_size=32).base
    text = script.Text(TOKENS, 64)
    found: dict[str, float] = script.floors(
        script.SHAPES[shape], config, text, one_rate(script, rate)
    )
    return found


def linears(script: ModuleType, shape: str) -> dict[str, tuple[int, int]]:
    """Return [O, I] of each linear of a block, without routers."""
    found = {}
    for name, size in script.SHAPES[shape].block_tensors(0):
        if len(size) == 2 and not name.endswith("mlp.gate.weight"):
            found[name] = size
    return found


@pytest.mark.parametrize("shape", ["tiny", "tiny-moe", "tiny-latent"])
def test_the_floor_of_products_is_that_of_each_linear(shape: str, script: ModuleType) -> None:
    sizes = linears(script, shape)
    pairs = sum(position + 1 for position in range(64)) * (TOKENS // 64)
    widths = {"tiny": 4 * 64, "tiny-moe": 4 * 64, "tiny-latent": 4 * (32 + 32 + 32)}
    forward, hessian = 2.0 * pairs * widths[shape], 0.0
    feedback, weights = 0.0, 0
    for name, (rows, columns) in sizes.items():
        tokens = TOKENS
        if ".experts." in name:
            tokens = TOKENS * 4 // script.SHAPES[shape].experts
        forward += 2 * tokens * rows * columns
        if not name.endswith(SHARE_AN_INPUT):
            hessian += tokens * columns * (columns + 1)
        feedback += rows * columns**2
        weights += rows * columns
    products = floors_of(script, shape, "balanced", "bfloat16")
    assert products["forward"] == pytest.approx(forward)
    assert products["hessian"] == pytest.approx(hessian)
    assert products["columns"] == feedback
    assert products["refine"] == 5 * 2 * feedback
    assert floors_of(script, shape, "balanced", "candidates")["search"] == 50 * weights
    assert floors_of(script, shape, "balanced", "column_rows")["refine"] == 4 * weights


# The least multiplications with each token that sum the shifts of each input in turn
SHIFTS = {
    "tiny": [
        128 * 128,  # of q, k and v_proj
        128 * 128 + 128 * 128,  # of o_proj with its drift, or two products with its weight
        128 * 128,  # of gate and up_proj
        2 * 128 * 256,  # two products with the weight of down_proj, not (256 + 128) * 256
    ],
    "tiny-latent": [
        128 * 128,
        64 * 64,
        32 * 32,
        128 * 128 + 128 * 128,  # only o_proj writes into the hidden states by itself
        4 * (128 * 128 + 64 * 64),  # each token is sent to 4 experts
        128 * 128 + 64 * 64,  # of the expert of all tokens
    ],
}


@pytest.mark.parametrize("shape", SHIFTS)
def test_following_the_original_doubles_forwards_and_adds_a_shift(
    shape: str, script: ModuleType
) -> None:
    once, twice = (floors_of(script, shape, name, "bfloat16") for name in ("balanced", "best"))
    assert twice["forward"] == 2 * once["forward"]
    assert twice["shift"] == 2 * TOKENS * sum(SHIFTS[shape])
    # Two exact solutions, each half a product of three parts, and one in bfloat16; three products
    # with a shift that is not one of rows
    follow = 0.0
    for name, (rows, columns) in linears(script, shape).items():
        products = 3 * 2 * 0.5 + 0.5
        if (shape, name.split(".")[-2]) != ("tiny", "down_proj"):
            products += 3
        follow += products * 2 * rows * columns**2
    assert twice["follow"] == follow


def test_shifts_take_the_products_of_their_floor(script: ModuleType) -> None:
    shape = replace(script.SHAPES["tiny"], hidden=256, intermediate=2048)
    parts = script.count(shape, script.H100, preset="best", **TEXT)["parts"]
    config = QuantizeConfig(bits=4, preset="best", group_size=32).base
    least = script.floors(shape, config, script.Text(TOKENS, 64), one_rate(script, "bfloat16"))
    assert parts["shift"]["products"] == pytest.approx(least["shift"], rel=1e-3)


def test_a_block_that_takes_more_memory_fails(
    script: ModuleType, balanced: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    case = {"shape": "tiny", "preset": "balanced", **balanced}
    peak = balanced["peak_device_bytes"]
    assert script.exit_code([{**case, "memory": peak}]) == 0
    assert script.exit_code([{**case, "memory": peak - 1}]) == 1
    error = "error: a block of tiny with preset balanced takes more memory\n"
    assert capsys.readouterr().err == error


def test_each_weight_is_moved_once_at_least(script: ModuleType) -> None:
    weights = sum(rows * columns for rows, columns in linears(script, "tiny").values())
    moved = floors_of(script, "tiny", "gptq", "memory")
    assert moved["put back"] == 3 * weights
    assert moved["pack"] == 1.5 * weights
    assert moved["forward"] == 2 * weights + 2 * 2 * TOKENS * 128
    assert floors_of(script, "tiny", "gptq", "pinned_copy")["copy"] == 2 * weights
    assert "search" not in moved
    assert script.floor_of_block({"forward": 3.0, "columns": 2.0, "copy": 4.0}) == 5
    assert script.floor_of_block({"forward": 3.0, "columns": 2.0, "copy": 6.0}) == 6


def test_a_whole_run_is_its_blocks_and_what_is_around_them(script: ModuleType) -> None:
    shape, config = script.SHAPES["tiny"], QuantizeConfig(bits=4, group_size=32, nsamples=4)
    quick = script.whole_run(shape, config, script.H100, 0.0)
    slow = script.whole_run(shape, config, script.H100, 3.0)
    assert (slow["parts"].pop("blocks"), quick["parts"].pop("blocks")) == (2 * 3.0, 0.0)
    # the hidden states of two blocks, 4 x 2048 x 128 numbers of 16 bits
    saved = slow["parts"].pop("saving")
    assert saved == pytest.approx(2 * 4 * 2048 * 128 * 2 / script.H100.disk_writes)
    assert quick["parts"].pop("saving") == 0
    # of the copies, what takes longer than the blocks
    assert (slow["parts"].pop("beside"), quick["parts"].pop("beside") > 0) == (0, True)
    assert slow["parts"] == quick["parts"]
    assert slow["parts"]["start"] == script.H100.import_seconds
    assert "gradients" not in slow["parts"]
    around = sum(slow["parts"].values())
    assert slow["run_seconds"] == pytest.approx(6.0 + saved + around)
    assert quick["run_seconds"] > around
    rates = script.H100
    # Cached kernels are loaded before transformers is imported; compiled ones are not ready then.
    assert rates.torch_seconds + rates.cached_kernel_seconds < rates.import_seconds
    saved_by_cache = rates.torch_seconds + rates.kernel_seconds - rates.import_seconds
    assert slow["cached_seconds"] == pytest.approx(slow["run_seconds"] - saved_by_cache)
    *_, whole, last = script.lines_of_run(slow, 2)
    assert whole.startswith(f"a run of 2 blocks takes {slow['run_seconds']:.0f} s (estimated); ")
    assert last.endswith(f" compiled: {slow['cached_seconds']:.0f} s (estimated)")


def test_a_whole_run_with_gradients_takes_them_first(script: ModuleType) -> None:
    shape = script.SHAPES["tiny"]
    settings: dict[str, Any] = {"bits": 4, "group_size": 32, "nsamples": 4}
    plain = script.whole_run(shape, QuantizeConfig(**settings), script.H100, 3.0)
    aware = QuantizeConfig(loss_aware=True, **settings)
    found = script.whole_run(shape, aware, script.H100, 3.0)
    passing = found["parts"]["gradients"]
    # States of 8192 tokens before two blocks are written and hashed.
    states = 2 * 8192 * 128 * 2
    assert passing > states / script.H100.disk_writes + states / script.H100.hashes
    assert found["run_seconds"] == pytest.approx(plain["run_seconds"] + passing)


# Seconds of a block as `count_gpu_work.py` counts them, which takes too long for a test
COUNTED = {
    ("llama-3-8b", "gptq"): 0.494,
    ("llama-3-8b", "balanced"): 0.608,
    ("llama-3-8b", "best"): 1.132,
    ("llama-3-8b", "max"): 5.392,
    ("qwen3-30b-a3b", "gptq"): 0.428,
    ("qwen3-30b-a3b", "balanced"): 0.597,
    ("qwen3-30b-a3b", "best"): 0.967,
}


SLOW_PLANS = [("qwen3-30b-a3b", "gptq"), ("qwen3-30b-a3b", "balanced")]  # of 18,000 layers
PLANS = []
for _case in COUNTED:
    _marks = ()
    if _case in SLOW_PLANS:
        _marks = pytest.mark.slow
    PLANS.append(pytest.param(*_case, marks=_marks))


@pytest.mark.parametrize(("shape", "preset"), PLANS)
def test_plan_time_is_within_a_tenth_of_counted_blocks(
    shape: str, preset: str, script: ModuleType
) -> None:
    config = QuantizeConfig(bits=4, preset=preset, group_size=128)
    seconds = COUNTED[shape, preset]
    found = script.whole_run(script.SHAPES[shape], config, script.H100, seconds)
    assert found["plan_seconds"] == pytest.approx(found["run_seconds"], rel=0.1)


def test_the_table_says_that_its_time_is_estimated(
    script: ModuleType, balanced: dict[str, Any]
) -> None:
    *_, last = script.table(balanced)
    assert "s (estimated from public rates of an H100, not measured); its floor is " in last
