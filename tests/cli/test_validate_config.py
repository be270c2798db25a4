"""`gptq validate-config` prints all problems, or the configuration and the plan of a model."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from gptq_cli.config.resolve import resolve
from gptq_cli.config.schema import QuantizeConfig

from .conftest import Run


def write(folder: Path, text: str) -> Path:
    path = folder / "c.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def make_model(folder: Path, *, hidden: int = 256, inner: int = 320, n_blocks: int = 2) -> Path:
    """Write a checkpoint of headers and zeros."""
    shapes = {"model.embed_tokens.weight": [64, hidden]}
    for block in range(n_blocks):
        shapes[f"model.layers.{block}.self_attn.q_proj.weight"] = [hidden, hidden]
        shapes[f"model.layers.{block}.mlp.down_proj.weight"] = [hidden, inner]
    header: dict[str, Any] = {}
    end = 0
    for name, (rows, columns) in shapes.items():
        start, end = end, end + 2 * rows * columns
        header[name] = {"dtype": "BF16", "shape": [rows, columns], "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    model = folder / "model"
    model.mkdir()
    (model / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(end))
    (model / "config.json").write_text(
        json.dumps({"model_type": "llama", "vocab_size": 64}), encoding="utf-8"
    )
    return model


def test_a_printed_configuration_is_valid_again(gptq: Run, tmp_path: Path) -> None:
    file = write(tmp_path, "bits: 4\nsym: false\n")
    result = gptq("validate-config", file, "--print-config")
    assert (result.exit_code, result.stderr) == (0, "")
    again = write(tmp_path, result.stdout)
    assert resolve({}, {}, again).config == QuantizeConfig(bits=4, sym=False)


def test_a_valid_file_is_ok_in_one_line(gptq: Run, tmp_path: Path) -> None:
    file = write(tmp_path, "bits: 3\nsym: false\n")
    result = gptq("validate-config", file)
    said = f"{file}: ok, 3 bits, group_size 128, format gptq_v2, preset balanced\n"
    assert (result.exit_code, result.stdout, result.stderr) == (0, said, "")
    assert gptq("validate-config", file, "-q").stdout == "ok\n"
    average = gptq("validate-config", write(tmp_path, "bits: 3.5\ngroup_size: auto\n"))
    assert ": ok, 3.5 bits, group_size auto, " in average.stdout


def test_json_carries_configuration_and_notes(gptq: Run, tmp_path: Path) -> None:
    result = gptq("validate-config", write(tmp_path, "bits: 4\npad_token_id: 1\n"), "--json")
    data = json.loads(result.stdout)
    assert (data["status"], data["config"]["bits"]) == ("ok", 4)
    assert data["notes"][0].startswith("pad_token_id has no effect")
    assert "note: pad_token_id has no effect" in result.stderr


def test_every_problem_has_its_line_and_column(gptq: Run, tmp_path: Path) -> None:
    path = write(tmp_path, "bits: 9\ngroup_sise: 3\n")
    result = gptq("validate-config", path)
    assert (result.exit_code, result.stdout) == (2, "")
    assert (
        result.stderr
        == f"""\
error[E_CFG_RANGE]: bits must be 2, 3, 4, 5, 6, 7 or 8, or an average such as 3.5, got 9
  --> {path}:1:7
   1 | bits: 9
     |       ^

hint: 8 bits are the most; a rule `-:NAME` of dynamic keeps a layer as it is

error[E_CFG_UNKNOWN_KEY]: group_sise is not a known key
  --> {path}:2:1
   2 | group_sise: 3
     | ^

hint: did you mean group_size?

2 problems
"""
    )
    data = json.loads(gptq("validate-config", path, "--json").stdout)
    assert [problem["location"]["line"] for problem in data["problems"]] == [1, 2]


@pytest.mark.parametrize("before", [0, 5, 300])
def test_the_caret_stands_below_the_value(before: int, gptq: Run, tmp_path: Path) -> None:
    path = tmp_path / "cfg.yaml"
    rule = "é" * before + "\t"
    path.write_bytes(f"# x\r\ndynamic: {{'+:{rule}': {{bits: 9}}}}\r\n".encode())
    lines = gptq("validate-config", path).stderr.splitlines()
    place = next(index for index, line in enumerate(lines) if line.startswith("  --> "))
    line, caret = lines[place + 1 : place + 3]
    assert line.startswith("   2 | ")
    assert line[caret.index("^")] == "9"
    assert len(line) < 100


def test_a_line_of_a_file_cannot_forge_a_message(gptq: Run, tmp_path: Path) -> None:
    path = write(tmp_path, "bits: '9\x1b[31m\u2028error[E_BUG]: no'\n")
    for colour in ("never", "always"):
        result = gptq("validate-config", path, "--color", colour)
        assert "\x1b[31m\u2028" not in result.stderr
        assert "\nerror[E_BUG]" not in result.stderr
        assert "\u2028" not in result.stderr


def test_validate_config_ignores_variables(
    gptq: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPTQ_BITS", "3")
    monkeypatch.setenv("GPTQ_GROUP_SIZE", "none")
    result = gptq("validate-config", write(tmp_path, "sym: true\n"))
    assert result.exit_code == 0
    assert ": ok, 4 bits, group_size 128, " in result.stdout


def test_a_model_adds_the_plan_of_its_layers_and_the_engines(gptq: Run, tmp_path: Path) -> None:
    model = make_model(tmp_path)
    path = write(
        tmp_path,
        "bits: 4\ngroup_size: 64\ndynamic: {'-:.*layers\\.1\\.mlp': {}, '+:.*mlp': {bits: 8}}\n",
    )
    result = gptq("validate-config", path, "--model", model)
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].startswith(f"{path}: ok, 4 bits, group_size 64, ")
    printed = gptq("validate-config", path, "--model", model, "--print-config").stdout
    assert [line.removeprefix("# ") for line in printed.splitlines()[-len(lines) + 1 :]] == lines[
        1:
    ]
    for line in (
        "# 2 layers: 4 bits, group_size 64 (default)",
        "# 1 layer: 8 bits, group_size 64 (rule '+:.*mlp')",
        "# 1 layer: full precision (rule '-:.*layers\\.1\\.mlp': kept)",
        "# loads in sglang, gptqmodel, onnxruntime-genai, auto-round, aphrodite",
        "# loads with limits in vllm: not on cpu: its kernel for CPUs has 4 bits only",
        "# does not load in transformers: "
        "it ignores `dynamic`, all layers must share their bits and group_size",
    ):
        assert line in printed
    data = json.loads(gptq("validate-config", path, "--model", model, "--json").stdout)
    assert [layer["bits"] for layer in data["plan"]["layers"]] == [4, 8, 4, None]
    assert data["plan"]["engines"]["llama.cpp"]["outcome"] == "no"


def test_layers_that_the_group_size_does_not_divide_are_named(gptq: Run, tmp_path: Path) -> None:
    result = gptq("validate-config", write(tmp_path, "bits: 4\n"), "--model", make_model(tmp_path))
    assert (result.exit_code, result.stdout) == (2, "")
    assert "error[E_SHAPE]: group_size 128 does not divide the 320 input features" in result.stderr
    assert "mlp.down_proj" in result.stderr


def test_a_missing_model_is_an_input_error(gptq: Run, tmp_path: Path) -> None:
    result = gptq("validate-config", write(tmp_path, "bits: 4\n"), "--model", "org/name")
    assert result.exit_code == 3
    assert "error[E_MODEL_NOT_FOUND]: `org/name` is not a directory" in result.stderr
