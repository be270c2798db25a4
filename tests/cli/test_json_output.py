"""The output of every command with --json fits the published schema."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from gptq_cli.cli.app import COMMANDS
from gptq_cli.quantization.run import quantize_checkpoint
from tests.disks import Killed
from tests.families import save_model, texts
from tests.runs import config
from tests.tiny import killer

from .conftest import OUTPUT_SCHEMA, Run, validate_output

WITHOUT_JSON = {"schema"}  # its result is JSON already
NEEDS_MORE = {"push", "check-engine", "eval"}  # Hub, engine, lm-eval: tests/cli have files


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a model, a text and a recipe into one folder."""
    folder = tmp_path_factory.mktemp("json")
    save_model(folder / "model")
    (folder / "text.txt").write_text(texts()[0], encoding="utf-8")
    (folder / "cfg.yaml").write_text("bits: 4\ngroup_size: 32\n", encoding="utf-8")
    return folder


def validated(result: Any, kind: str) -> dict[str, Any]:
    """Return the one line of stdout; it must fit the whole schema and the part for `kind`."""
    assert result.stdout.count("\n") == 1, result.stdout + result.stderr
    data: dict[str, Any] = json.loads(result.stdout)
    Draft202012Validator(OUTPUT_SCHEMA).validate(data)
    validate_output(data, kind)
    return data


def unfinished(model: Path, text: Path, output: Path) -> Path:
    """Return the work directory of a run that was killed after its first block."""
    settings = config(dataset=str(text), nsamples=4)
    with pytest.raises(Killed):
        quantize_checkpoint(str(model), output, settings, report=killer(0))
    return output.with_name(f".{output.name}.gptq-work")


def test_the_schema_is_valid_and_has_a_part_for_each_command() -> None:
    Draft202012Validator.check_schema(OUTPUT_SCHEMA)
    missing = set(COMMANDS) - WITHOUT_JSON - set(OUTPUT_SCHEMA["$defs"])
    assert not missing, (
        f"describe the --json output of {missing} in gptq_cli/cli/output.schema.json; run it below"
    )
    parts = {part["$ref"].rpartition("/")[2] for part in OUTPUT_SCHEMA["anyOf"]}
    assert set(COMMANDS) - WITHOUT_JSON <= parts
    assert "error" in parts


def test_every_result_fits_the_schema(gptq: Run, place: Path) -> None:
    model, text, out = place / "model", place / "text.txt", place / "out"
    sizes = ["--nsamples=4", "--batch-size=4", "--seqlen=64", "--device=cpu"]
    quantize = ["quantize", model, "-b4", "-g32", "--dataset", text, *sizes, "-o", out]
    few = ["--seqlen", "64", "--max-windows", "2"]
    commands: list[tuple[str, list[str | Path]]] = [
        ("plan", ["plan", *quantize[1:]]),
        ("plan", [*quantize, "--dry-run"]),
        ("quantize-print-config", [*quantize, "--print-config"]),
        ("quantize", [*quantize, "--report"]),
        ("allocate", ["allocate", *quantize[1:-2], "--allow-bits=3,4", "-o", place / "a.yaml"]),
        ("resume", ["resume", unfinished(model, text, place / "stopped")]),
        ("validate-config", ["validate-config", place / "cfg.yaml"]),
        ("validate-config", ["validate-config", place / "cfg.yaml", "--model", model]),
        ("eval-ppl", ["eval-ppl", out, "--dataset", text, "--baseline", model, *few]),
        ("generate", ["generate", out, "the quick", "--max-new-tokens", "2"]),
        ("inspect", ["inspect", out]),
        ("inspect", ["inspect", model]),
        ("inspect-layer", ["inspect", out, "--layer", "0.mlp.up_proj"]),
        ("inspect-layer", ["inspect", model, "--layer", "0.mlp.up_proj"]),
        ("compare", ["compare", out, model, "--text", text, *few]),
        ("convert", ["convert", out, "--to", "gptq_v2", "-o", place / "v2"]),
        ("dequantize", ["dequantize", out, "-o", place / "plain"]),
        ("report", ["report", out]),
        ("verify", ["verify", out, "--full"]),
        ("push-dry-run", ["push", out, "me/tiny", "--base-model", "org/tiny", "--dry-run"]),
        ("recipes", ["recipes"]),
        ("recipes-name", ["recipes", "vllm-4bit"]),
        ("explain", ["explain", "E_SHAPE"]),
        ("explain-all", ["explain"]),
        ("env", ["env"]),
    ]
    for kind, words in commands:
        data = validated(gptq(*words, "--json"), kind)
        assert data["schema"] == 1
    untried = set(COMMANDS) - WITHOUT_JSON - NEEDS_MORE - {kind for kind, _ in commands}
    assert not untried, f"run {untried} above"


def test_every_failure_fits_the_schema(gptq: Run, place: Path) -> None:
    model = place / "model"
    failures: list[list[str | Path]] = [
        ["quantize"],
        ["plan", "./none", "-b", "4"],
        ["inspect", model, "--layer", "x"],
        ["nothing"],
        ["validate-config", "none.yaml"],
        ["explain", "x"],
        ["recipes", "x"],
        ["report", model],
    ]
    for words in failures:
        result = gptq(*words, "--json")
        data = validated(result, "error")
        assert data["exit_code"] == result.exit_code > 0


def test_a_passed_gate_fits_the_schema(gptq: Run, place: Path) -> None:
    model, text = place / "model", place / "text.txt"
    words = ["eval-ppl", model, "--baseline", model, "--dataset", text, "--seqlen", "64"]
    words += ["--max-windows", "2"]
    result = gptq(*words, "--max-increase", "0", "--json")
    assert validated(result, "eval-ppl")["status"] == "ok"


def test_the_schema_refuses_unknown_and_wrong_values(gptq: Run) -> None:
    data = validated(gptq("env", "--json"), "env")
    for change in ({"more": 1}, {"schema": 2}, {"versions": None}, {"devices": [1]}):
        assert not Draft202012Validator(OUTPUT_SCHEMA).is_valid(data | change)
