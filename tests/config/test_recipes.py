"""The recipes of the package are valid, and each fits its description."""

from __future__ import annotations

from pathlib import Path

import pytest

import gptq_cli
from gptq_cli.config.resolve import describe_recipe, recipes, resolve
from gptq_cli.config.schema import QuantizeConfig
from gptq_cli.config.serving import export_of, verdicts

BITS = {
    "cpu-small": 4,
    "gptq-paper": 4,
    "mixed-4-8bit": 4,
    "moe": 4,
    "smallest-2bit": 2,
    "vllm-4bit": 4,
    "vllm-8bit": 8,
}


def recipe(name: str) -> QuantizeConfig:
    return resolve({}, {}, Path(name)).config


def judged(config: QuantizeConfig) -> dict[str, str]:
    layers = {name: config.for_layer(name) for name in ("model.layers.0.mlp.down_proj", "x")}
    found = verdicts(export_of(layers, config.format, lm_head=config.lm_head))
    return {verdict.engine: verdict.outcome for verdict in found}


def test_recipes_are_files_of_the_package_with_a_description() -> None:
    assert list(recipes()) == list(BITS)
    for file in recipes().values():
        assert file.is_relative_to(Path(gptq_cli.__file__).parent)
        assert 20 < len(describe_recipe(file)) < 120


@pytest.mark.parametrize("name", BITS)
def test_recipe_resolves_without_notes(name: str) -> None:
    found = resolve({}, {}, Path(name))
    assert found.notes == ()
    assert found.config.bits == BITS[name]


def test_the_vllm_4bit_recipe_loads_in_every_engine() -> None:
    assert set(judged(recipe("vllm-4bit")).values()) == {"yes"}


def test_other_recipes_for_vllm_load_in_vllm() -> None:
    assert judged(recipe("vllm-8bit"))["vllm"] == "limited"  # on GPU only
    assert judged(recipe("moe"))["vllm"] == "yes"


def test_smallest_recipe_loads_in_three_engines() -> None:
    found = judged(recipe("smallest-2bit"))
    for engine in ("transformers", "gptqmodel", "llama.cpp"):
        assert found[engine] == "yes"
    assert recipe("smallest-2bit").target == "llama.cpp"
    assert (found["sglang"], found["vllm"]) == ("no", "no")


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
    layers = [config.for_layer(name) for name in names]
    assert [layer.bits for layer in layers if layer is not None] == [8, 4, 4]
