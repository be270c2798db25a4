"""The recipes that ship are valid and do what they say."""

from __future__ import annotations

from pathlib import Path

import pytest

from gptq_cli.config.resolve import resolve
from gptq_cli.config.targets import Export, verdicts

RECIPES = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


def test_there_are_recipes() -> None:
    assert "vllm-4bit.yaml" in {path.name for path in RECIPES}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_a_recipe_resolves_without_remarks(path: Path) -> None:
    found = resolve({}, {}, path)
    assert found.notes == ()
    assert found.config.bits == 4


def test_the_vllm_recipe_loads_everywhere() -> None:
    config = resolve({}, {}, RECIPES[0].with_name("vllm-4bit.yaml")).config
    layers = [layer for name in ("model.layers.0.mlp.down_proj", "x") if (layer := config.for_layer(name))]
    judged = verdicts(Export.of(layers, config.format, config.lm_head))
    assert {verdict.outcome for verdict in judged} == {"yes"}


def test_the_mixed_recipe_gives_eight_bits_to_down_proj_alone() -> None:
    config = resolve({}, {}, RECIPES[0].with_name("mixed-4-8bit.yaml")).config
    names = ["model.layers.10.mlp.down_proj", "model.layers.10.mlp.up_proj", "model.layers.0.mlp.down_proj.x"]
    assert [layer.bits for name in names if (layer := config.for_layer(name))] == [8, 4, 4]
