"""Printed output, JSON and refusals of `gptq inspect`, `compare`, `convert` and `dequantize`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.families import save_model, texts
from tests.runs import quantize

from .conftest import Run
from .processes import run_process

ON_THE_TEXT = ["--seqlen", "64", "--max-windows"]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return a quantized model and the model it was made of; `text.txt` lies beside them."""
    folder = tmp_path_factory.mktemp("look")
    model = save_model(folder / "Tiny-1M")
    output, _ = quantize(folder, model, dynamic={r"-:.*\.0\.mlp": {}})
    (folder / "text.txt").write_text(texts()[0], encoding="utf-8")
    return output, model


def test_inspect_prints_layers_bits_and_engines_without_torch(
    pair: tuple[Path, Path],
) -> None:
    code, stdout, stderr, loaded = run_process(["inspect", str(pair[0])], {})
    assert (code, stderr, loaded) == (0, "", [])
    lines = stdout.splitlines()
    assert "quantized (gptq)" in lines
    assert "  3 x  self_attn.q_proj              128x64  4 bit g32" in lines
    assert "  1 x  mlp.down_proj                 64x128  F32" in lines
    assert any(line.startswith("bits     ") and "per quantized weight" in line for line in lines)
    assert any(line.split() == ["model_type", "llama"] for line in lines)
    assert any(line.startswith("loads in ") for line in lines)


def test_inspect_prints_json_or_the_format_alone(gptq: Run, pair: tuple[Path, Path]) -> None:
    data = json.loads(gptq("inspect", pair[0], "--json").stdout)
    assert (data["status"], data["method"], data["format"]) == ("ok", "gptq", "gptq")
    assert len(data["layers"]) == sum(row["count"] for row in data["quantized"]) == 18
    assert gptq("inspect", pair[0], "-q").stdout == "gptq\n"
    assert gptq("inspect", pair[1], "-q").stdout == "not quantized\n"


def test_inspect_draws_the_codes_of_a_layer(gptq: Run, pair: tuple[Path, Path]) -> None:
    result = gptq("inspect", pair[0], "--layer", "1.self_attn.q_proj")
    lines = result.stdout.splitlines()
    assert lines[0] == "model.layers.1.self_attn.q_proj  128x64  4 bit"
    start = next(i for i, line in enumerate(lines) if line.startswith("codes"))
    codes = [line.split() for line in lines[start + 1 : start + 17]]
    assert [int(row[0]) for row in codes] == list(range(16))
    assert sum(int(row[1]) for row in codes) == 128 * 64
    assert max(len(row[2]) for row in codes if len(row) > 2) == 40
    assert max(map(len, lines)) <= 80
    data = json.loads(gptq("inspect", pair[0], "--layer", "1.self_attn.q_proj", "--json").stdout)
    assert [int(row[1]) for row in codes] == data["layer"]["packed"]["codes"]["counts"]


def test_compare_counts_equal_tensors_and_names_the_worst(
    gptq: Run, pair: tuple[Path, Path]
) -> None:
    result = gptq("compare", *pair)
    assert result.exit_code == 0
    assert result.stdout.startswith("12 of 30 tensors are the same, 18 differ: mean weight error ")
    data = json.loads(gptq("compare", *pair, "--json").stdout)
    worst = max(data["tensors"], key=lambda tensor: tensor["relative_error"])
    assert result.stdout.splitlines()[3].split()[-1] == worst["name"]
    assert data["predictions"] is None


def test_compare_with_text_measures_the_divergence(gptq: Run, pair: tuple[Path, Path]) -> None:
    text = pair[0].parent / "text.txt"
    result = gptq("compare", *pair, "--text", text, *ON_THE_TEXT, "3", "--json")
    data = json.loads(result.stdout)
    predictions, windows = data["predictions"], data["windows"]
    assert predictions["kl"] > 0
    assert (predictions["windows"], predictions["seqlen"]) == (3, 64)
    assert [window["first_token"] for window in windows] == [0, 64, 128]
    assert sum(window["kl"] for window in windows) / 3 == pytest.approx(predictions["kl"])
    assert "block 3/3" in result.stderr


def test_a_quiet_comparison_with_text_prints_its_kl(gptq: Run, pair: tuple[Path, Path]) -> None:
    text = pair[0].parent / "text.txt"
    words = ["compare", *pair, "--text", text, *ON_THE_TEXT, "2"]
    data = json.loads(gptq(*words, "--json").stdout)
    assert gptq(*words, "-q").stdout == f"{data['predictions']['kl']:.6g}\n"
    alone = gptq("compare", *pair, "-q").stdout
    assert 0 < float(alone) != data["predictions"]["kl"]


def test_compare_with_text_lists_the_worst_windows(gptq: Run, pair: tuple[Path, Path]) -> None:
    text = pair[0].parent / "text.txt"
    lines = gptq("compare", *pair, "--text", text, *ON_THE_TEXT, "7").stdout.splitlines()
    table = lines[lines.index("worst windows") :]
    divergences = [float(line.split()[0]) for line in table[2:]]
    assert len(divergences) == 5
    assert divergences == sorted(divergences, reverse=True)
    assert max(map(len, table)) <= 80


@pytest.mark.parametrize(
    ("words", "exit_code", "message", "hint"),
    [
        (["inspect", "./none"], 3, "error[E_MODEL_NOT_FOUND]", "a Hub id"),
        (
            ["inspect", "OUT", "--layer", "zzz"],
            2,
            "error[E_LAYER]: there is no layer `zzz`",
            "for example",
        ),
        (["compare", "OUT", "./none"], 3, "error[E_MODEL_NOT_FOUND]", "a Hub id"),
        (["compare", "OUT", "MODEL", "--seqlen", "8"], 2, "--seqlen needs --text", "add --text"),
        (
            ["compare", "OUT", "MODEL", "--text", "t", "--max-windows", "0"],
            2,
            "--max-windows must be greater than or equal to 1",
            "gptq compare --help",
        ),
        (
            ["convert", "OUT", "--to", "gptq_v3", "-o", "x"],
            2,
            '--to must be gptq, gptq_v2, compressed-tensors, mlx or auto-round, got "gptq_v3"',
            "",
        ),
        (["convert", "OUT", "--to", "gptq", "-o", "x"], 2, "E_CFG_NOTHING_TO_DO", "unchanged"),
        (
            ["convert", "OUT", "--to", "gptq_v2", "-o", "MODEL"],
            6,
            "error[E_OUT_EXISTS]",
            "--overwrite",
        ),
        (["convert", "OUT", "-o", "x"], 2, "the option --to is missing", "see gptq convert --help"),
        (["dequantize", "MODEL", "-o", "x"], 3, "is not quantized", "GPTQ"),
        (
            ["dequantize", "OUT", "-o", "x", "--dtype", "half"],
            2,
            "--dtype must be auto, bfloat16",
            "",
        ),
    ],
)
def test_impossible_requests_get_an_error_line_and_a_hint(
    words: list[str], exit_code: int, message: str, hint: str, gptq: Run, pair: tuple[Path, Path]
) -> None:
    names = {"OUT": str(pair[0]), "MODEL": str(pair[1])}
    result = gptq(*[names.get(word, word) for word in words])
    assert (result.exit_code, result.stdout) == (exit_code, "")
    assert message in result.stderr
    assert hint in result.stderr
    assert len([line for line in result.stderr.splitlines() if not line.startswith("note:")]) <= 4


def test_convert_and_dequantize_print_the_written_path(
    gptq: Run, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    result = gptq("convert", pair[0], "--to", "gptq_v2", "-o", tmp_path / "v2")
    assert result.stdout.splitlines()[0] == str(tmp_path / "v2")
    assert gptq("inspect", tmp_path / "v2", "-q").stdout == "gptq_v2\n"
    plain = tmp_path / "plain"
    assert gptq("dequantize", tmp_path / "v2", "-o", plain, "-q").stdout == f"{plain}\n"
    again = gptq("dequantize", tmp_path / "v2", "-o", plain, "--overwrite", "--json")
    data = json.loads(again.stdout)
    assert (data["output"], data["layers"]) == (str(plain), 18)
    compared = json.loads(gptq("compare", plain, pair[0], "--json").stdout)
    errors = [tensor["relative_error"] for tensor in compared["tensors"]]
    assert max(errors) == 0  # float32 holds the weights exactly
