"""What --json prints, of every command, is what the published schema says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from gptq_cli.cli.app import COMMANDS
from gptq_cli.config.schema import QuantizeConfig
from gptq_cli.events import BlockFinished, Event
from gptq_cli.quantization.run import quantize_checkpoint
from tests.families import save_model, texts

from .conftest import Run

WITHOUT_JSON = {"schema"}  # its result is JSON already
NEEDS_A_HUB = {"push"}  # tests/cli/test_push.py
SCHEMA = json.loads(
    (Path(__file__).parents[2] / "gptq_cli" / "cli" / "output.schema.json").read_text(
        encoding="utf-8"
    )
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("json")
    save_model(folder / "model")
    (folder / "text.txt").write_text(texts()[0], encoding="utf-8")
    (folder / "cfg.yaml").write_text("bits: 4\ngroup_size: 32\n", encoding="utf-8")
    return folder


def validated(result: Any, kind: str) -> dict[str, Any]:
    """The only line of stdout, which must fit the schema as a whole and the part for `kind`."""
    assert result.stdout.count("\n") == 1, result.stdout + result.stderr
    data: dict[str, Any] = json.loads(result.stdout)
    Draft202012Validator(SCHEMA).validate(data)
    Draft202012Validator({"$defs": SCHEMA["$defs"], "$ref": f"#/$defs/{kind}"}).validate(data)
    return data


def unfinished(model: Path, text: Path, output: Path) -> Path:
    """The work directory of a run that has ended after its first block."""

    def stop(event: Event) -> None:
        if isinstance(event, BlockFinished):
            raise KeyboardInterrupt

    sizes: dict[str, Any] = {"group_size": 32, "nsamples": 4, "batch_size": 4, "seqlen": 64}
    config = QuantizeConfig(bits=4, dataset=str(text), device="cpu", **sizes)
    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(str(model), output, config, report=stop)
    return output.with_name(f".{output.name}.gptq-work")


def test_the_schema_is_valid_and_has_a_part_for_each_command() -> None:
    Draft202012Validator.check_schema(SCHEMA)
    missing = set(COMMANDS) - WITHOUT_JSON - set(SCHEMA["$defs"])
    assert not missing, (
        f"describe the --json output of {missing} in gptq_cli/cli/output.schema.json, and run it below"
    )
    parts = {part["$ref"].rpartition("/")[2] for part in SCHEMA["anyOf"]}
    assert set(COMMANDS) - WITHOUT_JSON <= parts
    assert "error" in parts


def test_every_result_fits_the_schema(gptq: Run, place: Path) -> None:
    model, text, out = place / "model", place / "text.txt", place / "out"
    run = [
        "--dataset",
        str(text),
        "--nsamples",
        "4",
        "--batch-size",
        "4",
        "--seqlen",
        "64",
        "--device",
        "cpu",
    ]
    quantize = ["quantize", model, "-b", "4", "-g", "32", *run, "-o", out]
    commands: list[tuple[str, list[object]]] = [
        ("plan", ["plan", *quantize[1:]]),
        ("plan", [*quantize, "--dry-run"]),
        ("quantize-print-config", [*quantize, "--print-config"]),
        ("quantize", [*quantize, "--report"]),
        ("resume", ["resume", unfinished(model, text, place / "stopped")]),
        ("validate-config", ["validate-config", place / "cfg.yaml"]),
        ("validate-config", ["validate-config", place / "cfg.yaml", "--model", model]),
        ("eval-ppl", ["eval-ppl", out, "--dataset", text, "--seqlen", "64", "--baseline", model]),
        ("inspect", ["inspect", out]),
        ("inspect", ["inspect", model]),
        ("inspect-layer", ["inspect", out, "--layer", "0.mlp.up_proj"]),
        ("inspect-layer", ["inspect", model, "--layer", "0.mlp.up_proj"]),
        (
            "compare",
            ["compare", out, model, "--text", text, "--seqlen", "64", "--max-windows", "2"],
        ),
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
        data = validated(gptq(*map(str, words), "--json"), kind)
        assert data["schema"] == 1
    untried = set(COMMANDS) - WITHOUT_JSON - NEEDS_A_HUB - {kind for kind, _ in commands}
    assert not untried, f"run {untried} above"


def test_every_failure_fits_the_schema(gptq: Run, place: Path) -> None:
    model = place / "model"
    for words in (["quantize"], ["plan", "./none", "-b", "4"], ["inspect", model, "--layer", "x"], ["nothing"],
                  ["validate-config", "none.yaml"], ["explain", "x"], ["recipes", "x"], ["report", model]):  # fmt: skip
        result = gptq(*words, "--json")
        data = validated(result, "error")
        assert data["exit_code"] == result.exit_code > 0
    gated = [
        "eval-ppl",
        model,
        "--baseline",
        model,
        "--dataset",
        place / "text.txt",
        "--seqlen",
        "64",
    ]
    assert validated(gptq(*gated, "--max-increase", "0", "--json"), "eval-ppl")["status"] == "ok"


def test_the_schema_refuses_unknown_and_wrong_values(gptq: Run) -> None:
    data = validated(gptq("env", "--json"), "env")
    for change in ({"more": 1}, {"schema": 2}, {"versions": None}, {"devices": [1]}):
        assert not Draft202012Validator(SCHEMA).is_valid(data | change)
