"""`gptq schema` prints the schema for editors; the templates of `gptq recipes` name it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft7Validator, Draft202012Validator

from gptq_cli.cli.schema import MODELINE
from gptq_cli.config.resolve import FOLDER, recipes, to_yaml
from gptq_cli.config.schema import QuantizeConfig

from .conftest import FakeQuantizer, Run


@pytest.fixture
def schema(gptq: Run) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(gptq("schema").stdout)
    return found


def test_the_schema_is_valid_and_describes_every_field(
    schema: dict[str, Any],
) -> None:
    Draft7Validator.check_schema(schema)
    assert set(schema["properties"]) == set(QuantizeConfig.model_fields)
    assert all(field["description"] for field in schema["properties"].values())
    assert "2, 3, 4, 5, 6, 7 or 8" in schema["properties"]["bits"]["description"]
    assert "$defs" not in json.dumps(schema)  # drafts before 2019 call them definitions


def test_the_schema_agrees_with_the_program(
    schema: dict[str, Any],
) -> None:
    check = Draft7Validator(schema)
    for config in (
        QuantizeConfig(),
        QuantizeConfig(bits=3, sym=False, dynamic={".*q": {"bits": 8}}, dataset=["a"]),
    ):
        check.validate(yaml.safe_load(to_yaml(config)))
    for wrong in (
        {"bits": 9},
        {"bits": 4, "group_sise": 3},
        {"bits": 4, "dynamic": {"x": {"bit": 4}}},
        {"bits": 4, "damp_percent": 1},
        {"bits": 4, "preset": "x"},
        {"bits": 4, "device": "g"},
    ):
        assert not check.is_valid(wrong)


def test_recipes_point_to_the_schema_beside_them_and_fit_it(schema: dict[str, Any]) -> None:
    assert json.loads((FOLDER / "gptq.schema.json").read_text()) == schema, "run: make schema"
    for file in recipes().values():
        assert file.read_text().splitlines()[0] == MODELINE
        Draft7Validator(schema).validate(yaml.safe_load(file.read_text()))


def test_schema_prints_the_schema_of_the_output(gptq: Run) -> None:
    Draft202012Validator.check_schema(json.loads(gptq("schema", "output").stdout))
    result = gptq("schema", "outputs")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "error[E_CFG_RANGE]: there are schemas of config and output" in result.stderr
    assert "did you mean output?" in result.stderr


def test_recipes_are_listed_and_printed(gptq: Run) -> None:
    names = [line.split()[0] for line in gptq("recipes").stdout.splitlines()]
    assert names == sorted(recipes())
    assert gptq("recipes", "moe").stdout == recipes()["moe"].read_text()
    result = gptq("recipes", "mo")
    assert (result.exit_code, result.stdout) == (2, "")
    expected = "error[E_CFG_FILE]: there is no recipe `mo`\n\nhint: did you mean moe?\n"
    assert result.stderr == expected


def test_a_file_takes_precedence_over_a_recipe(
    gptq: Run, quantizer: FakeQuantizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert gptq("quantize", "m", "--config", "vllm-8bit").exit_code == 0
    (tmp_path / "vllm-8bit").write_text("bits: 3\n")
    assert gptq("quantize", "m", "--config", "vllm-8bit").exit_code == 0
    assert [call["config"].bits for call in quantizer.calls] == [8, 3]
    assert gptq("validate-config", "cpu-small").exit_code == 0


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("vllm-4bits", "did you mean the recipe vllm-4bit?"),
        ("zzz", "`gptq recipes` lists the names"),
    ],
)
def test_an_unknown_recipe_gets_the_nearest_as_hint(
    name: str, hint: str, gptq: Run, quantizer: FakeQuantizer
) -> None:
    result = gptq("quantize", "m", "--config", name)
    assert (result.exit_code, result.stdout) == (2, "")
    assert f"error[E_CFG_FILE]: there is no file and no recipe `{name}`" in result.stderr
    assert hint in result.stderr
    assert quantizer.calls == []
