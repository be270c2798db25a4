"""The recipes that ship are valid, belong to the package, and do what they say."""

from __future__ import annotations

from pathlib import Path

import pytest

import gptq_cli
from gptq_cli.config.resolve import describe_recipe, recipes, resolve
from gptq_cli.config.schema import QuantizeConfig
from gptq_cli.config.serving import export_of, verdicts

NAMES = [
    "cpu-small",
    "gptq-paper",
    "mixed-4-8bit",
    "moe",
    "smallest-2bit",
    "vllm-4bit",
    "vllm-8bit",
]


def recipe(name: str) -> QuantizeConfig:
    return resolve({}, {}, Path(name)).config


def judged(config: QuantizeConfig) -> dict[str, str]:
    layers = {name: config.for_layer(name) for name in ("model.layers.0.mlp.down_proj", "x")}
    found = verdicts(export_of(layers, config.format, lm_head=config.lm_head))
    return {verdict.engine: verdict.outcome for verdict in found}


def test_recipes_are_files_of_the_package_with_a_description() -> None:
    assert list(recipes()) == NAMES
    for file in recipes().values():
        assert file.is_relative_to(Path(gptq_cli.__file__).parent)
        assert 20 < len(describe_recipe(file)) < 120


@pytest.mark.parametrize("name", NAMES)
def test_recipe_resolves_without_notes(name: str) -> None:
    found = resolve({}, {}, Path(name))
    assert found.notes == ()
    assert {"2": 2, "8": 8}.get(
        next((d for d in name if d in "28"), ""), 4
    ) == found.config.bits or "mixed" in name


def test_vllm_recipes_load_in_vllm() -> None:
    assert set(judged(recipe("vllm-4bit")).values()) == {"yes"}
    assert judged(recipe("vllm-8bit"))["vllm"] == "limited"  # on GPU only
    assert judged(recipe("moe"))["vllm"] == "yes"


def test_smallest_recipe_loads_in_three_engines() -> None:
    found = judged(recipe("smallest-2bit"))
    assert [
        engine for engine in ("transformers", "gptqmodel", "llama.cpp") if found[engine] != "yes"
    ] == []
    assert found["sglang"] == "limited"
    assert found["vllm"] == "no"


def test_paper_recipe_has_the_settings_of_the_paper() -> None:
    config = recipe("gptq-paper")
    assert (config.sym, config.group_size, config.damp_percent, config.dataset) == (
        False,
        -1,
        0.01,
        "c4",
    )
    assert (config.desc_act, config.act_group_aware, config.static_groups) == (False, False, False)


def test_mixed_recipe_gives_eight_bits_to_down_proj_only() -> None:
    config = recipe("mixed-4-8bit")
    names = [
        "model.layers.10.mlp.down_proj",
        "model.layers.10.mlp.up_proj",
        "model.layers.0.mlp.down_proj.x",
    ]
    assert [layer.bits for name in names if (layer := config.for_layer(name))] == [8, 4, 4]
