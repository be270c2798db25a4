"""Units, harms and rules of models that were never measured: their figures are made up."""

from __future__ import annotations

from pathlib import Path

import pytest

from gptq_cli.allocation.goals import about_units, fusing_engines
from gptq_cli.allocation.harms import Measurement, harms_of
from gptq_cli.allocation.rules import with_widths
from gptq_cli.allocation.solution import Allocator
from gptq_cli.allocation.units import Unit, find_units
from gptq_cli.planning.plan import plan_run
from tests.families import save_model
from tests.runs import config

WIDTHS = (2, 3, 4, 8)


def units_of(
    model: Path, protect: str | None = None, *, fused: bool = True, **changes: object
) -> list[Unit]:
    """Return the units of a model at `WIDTHS`."""
    plans = {width: plan_run(model, config(bits=width, **changes)) for width in WIDTHS}
    return find_units(plans, protect, fused=fused)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a model of three blocks."""
    return save_model(tmp_path_factory.mktemp("llama") / "model", "llama")


def test_units_are_what_engines_fuse(llama: Path) -> None:
    units = units_of(llama, lm_head=True)
    assert sorted({(unit.kind, len(unit.layers)) for unit in units}) == [
        ("lm_head", 1),
        ("mlp.down_proj", 1),
        ("mlp.gate_up_proj", 2),
        ("self_attn.o_proj", 1),
        ("self_attn.qkv_proj", 3),
    ]
    assert [unit.block for unit in units] == sorted(unit.block for unit in units)
    assert all(tuple(unit.widths) == WIDTHS for unit in units)


def test_each_linear_is_a_unit_if_no_engine_fuses_it(llama: Path) -> None:
    units = units_of(llama, fused=False)
    assert [unit.layers for unit in units] == [(unit.name,) for unit in units]
    leaves = {unit.kind.rpartition(".")[2] for unit in units}
    assert leaves == {f"{leaf}_proj" for leaf in ("q", "k", "v", "o", "gate", "up", "down")}
    assert len(units) == 3 * len(leaves)


@pytest.mark.parametrize("fused", [True, False])
def test_all_experts_of_a_block_stay_one_unit(fused: bool, tmp_path: Path) -> None:
    units = units_of(save_model(tmp_path / "model", "qwen3_moe"), fused=fused)
    experts = [unit for unit in units if unit.kind == "mlp.experts"]
    assert [unit.block for unit in experts] == [0, 1]
    assert len({len(unit.layers) for unit in experts}) == 1
    assert len(experts[0].layers) > 3


@pytest.mark.parametrize(
    ("settings", "fusing"),
    [
        ({"allow_bits": [2, 3, 4]}, []),
        ({"allow_bits": [4, 8]}, ["vllm", "sglang", "aphrodite"]),
        ({"allow_bits": [4, 8], "target": "gptqmodel"}, []),
        ({"allow_bits": [4, 8], "target": "vllm@0.30"}, ["vllm@0.30"]),
        ({"allow_bits": [4, 8], "sym": False}, []),
        ({"allow_bits": [2, 3, 4], "target": "sglang@0.5.19"}, ["sglang@0.5.19"]),
        ({"allow_bits": [2, 3, 4], "format": "compressed-tensors"}, ["vllm"]),
        ({"allow_bits": [2, 3, 4], "format": "mlx"}, []),
    ],
)
def test_engines_fuse_only_what_they_load(settings: dict[str, object], fusing: list[str]) -> None:
    wanted = config(bits=4, **settings)
    found = fusing_engines(wanted)
    assert found == fusing
    why = about_units(found, wanted.target)
    assert ("q, k and v get one width" in why) == bool(fusing)
    assert wanted.target is None or wanted.target in why


def test_the_target_any_is_no_engine() -> None:
    why = about_units([], "any")
    assert why.endswith("because no engine that takes these widths fuses them")


def test_sizes_of_units_add_up_to_the_file(llama: Path) -> None:
    plans = {width: plan_run(llama, config(bits=width)) for width in WIDTHS}
    units = units_of(llama)
    for width, plan in plans.items():
        packed = sum(layer.packed_bytes(plan.packing) for layer in plan.quantized)
        assert sum(unit.nbytes[width] for unit in units) == packed


def test_ruled_and_protected_layers_have_one_width(llama: Path) -> None:
    rules = {"-:.*[.]0[.].*down_proj": {}, "+:.*[.]1[.].*down_proj": {"bits": 3}}
    units = {unit.name: unit for unit in units_of(llama, ".*o_proj", dynamic=rules)}
    assert "model.layers.0.mlp.down_proj" not in units
    ruled = units["model.layers.1.mlp.down_proj (3 bits by a rule)"]
    assert (ruled.ruled, ruled.widths) == (True, [3])
    assert units["model.layers.2.mlp.down_proj"].widths == [2, 3, 4, 8]
    assert units["model.layers.2.self_attn.o_proj"].widths == [8]


def test_rules_give_each_layer_its_width_and_keep_those_of_the_user(llama: Path) -> None:
    own = {"-:.*[.]0[.].*down_proj": {}, "+:.*[.]1[.].*down_proj": {"group_size": 64}}
    base = config(bits=8, dynamic=own, lm_head=True)
    units = units_of(llama, dynamic=own, lm_head=True)
    widths = [WIDTHS[number % 3] for number in range(len(units))]
    for number, unit in enumerate(units):
        if unit.ruled:
            widths[number] = unit.widths[0]
    found = with_widths(base, units, widths)
    assert list(found.dynamic)[:2] == list(own)
    for unit, width in zip(units, widths, strict=True):
        for name in unit.layers:
            chosen = found.for_layer(name)
            assert chosen is not None
            expected = found.bits if unit.ruled else width
            assert chosen.bits == expected, name
    assert found.for_layer("model.layers.0.mlp.down_proj") is None


def test_harms_follow_what_was_measured(llama: Path) -> None:
    units = units_of(llama)
    kl = {unit.name: 0.1 * (number + 1) for number, unit in enumerate(units)}
    harms = harms_of(units, Measurement(kl, uniform=3.0), reference=3)
    assert sum(of_unit[3] for of_unit in harms) == pytest.approx(3.0)
    assert harms[4][3] / harms[0][3] == pytest.approx(5)
    assert harms[0][2] / harms[0][3] == pytest.approx((7 / 3) ** 2)
    assert harms[0][8] / harms[0][4] == pytest.approx((15 / 255) ** 2)
    assert all(list(of_unit.values()) == sorted(of_unit.values())[::-1] for of_unit in harms)


def test_the_limit_of_kl_costs_the_fewest_bytes(llama: Path) -> None:
    units = units_of(llama)
    harms = [{width: 4.0 ** (2 - width) for width in WIDTHS} for _ in units]

    def size_of(widths: object) -> int:
        assert isinstance(widths, tuple | list)
        return sum(unit.nbytes[width] for unit, width in zip(units, widths, strict=True))

    allocator = Allocator(units, harms, size_of)
    limit = 5.0
    found = allocator.solve(config(bits=8, target_kl=limit))
    assert found.kl < limit
    smaller = allocator.solve(config(bits=8, target_size=found.nbytes - 1))
    assert smaller.kl >= limit
    assert smaller.nbytes < found.nbytes
