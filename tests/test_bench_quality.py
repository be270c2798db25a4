"""The script that measures settings: its figures, its tables, and its rows after a stop."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from safetensors.torch import load_file

from gptq_cli.evaluation.perplexity import evaluate_perplexity
from gptq_cli.evaluation.request import EvalRequest
from tests.families import save_model, text_file, written
from tests.runs import quantize, reader

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
OTHER = "the dog is lazy, but the fox is quick; so they do not meet at all. " * 20
SEQLEN = 32


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return import_module("bench_quality")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench-quality")
    return save_model(folder / "model", "llama", num_hidden_layers=2)


class Bench:
    """The script with a model, two texts, and one file for the rows."""

    def __init__(
        self, script: ModuleType, model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.file, self.outputs = folder / "rows.json", folder / "outputs"
        self._script, self._monkeypatch = script, monkeypatch
        self.texts = [text_file(), written(OTHER)]
        self._fixed = [str(model), "--calibration", text_file(), "--evaluation", *self.texts]
        self._fixed += ["--seqlen", str(SEQLEN), "--windows", "5", "3", "--group-size", "32"]
        self._fixed += ["--json", str(self.file), "--reference", "fast"]

    def run(self, *arguments: str) -> list[dict[str, Any]]:
        line = ["bench_quality.py", *self._fixed, *arguments]
        self._monkeypatch.setattr("sys.argv", line)
        self._script.main()
        rows: list[dict[str, Any]] = json.loads(self.file.read_text())["rows"]
        return rows


@pytest.fixture
def bench(
    script: ModuleType, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Bench:
    return Bench(script, model, tmp_path, monkeypatch)


FAST = ("--settings", "fast", "--nsamples", "4")


def test_figures_are_those_of_eval_ppl_on_each_text(bench: Bench, model: Path) -> None:
    (row,) = bench.run(*FAST, "--bits", "2", "--keep", str(bench.outputs))
    output = bench.outputs / "fast-2bit-g32-4x32"
    for text, quality, windows in zip(bench.texts, row["texts"].values(), (5, 3), strict=True):
        request = EvalRequest(
            dataset=text,
            seqlen=SEQLEN,
            max_windows=windows,
            device="cpu",
            baseline=str(model),
            batch_size=4,
        )
        wanted = evaluate_perplexity(str(output), request)
        assert quality["kl"] == pytest.approx(wanted.kl, rel=1e-5)
        assert quality["top1"] == wanted.top1_agreement
        assert quality["perplexity"] == pytest.approx(wanted.perplexity, rel=1e-5)
        assert quality["original_perplexity"] == pytest.approx(wanted.baseline_perplexity)
    assert row["processor_seconds"] > 0


def test_rows_in_the_file_are_not_run_again(
    bench: Bench, script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = bench.run(*FAST, "--bits", "2", "4")
    quantized: list[str] = []
    measure = script.measure

    def counted(arguments: Any, plan: dict[str, Any], texts: Any) -> Any:
        quantized.append(f"{plan['setting']}, {plan['bits']} bits, {plan['nsamples']} windows")
        return measure(arguments, plan, texts)

    monkeypatch.setattr(script, "measure", counted)
    rows = bench.run("--settings", "fast", "rtn", "--bits", "2", "--nsamples", "4", "5")
    assert quantized == [
        "rtn, 2 bits, 4 windows",
        "fast, 2 bits, 5 windows",
        "rtn, 2 bits, 5 windows",
    ]
    assert rows[:2] == before
    assert len(rows) == 5


def test_each_row_is_written_as_soon_as_it_is_measured(
    bench: Bench, script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = script.measure

    def stopped(arguments: Any, plan: dict[str, Any], texts: Any) -> Any:
        if plan["bits"] == 4:
            raise KeyboardInterrupt
        return measure(arguments, plan, texts)

    monkeypatch.setattr(script, "measure", stopped)
    with pytest.raises(KeyboardInterrupt):
        bench.run(*FAST, "--bits", "2", "4")
    assert [row["bits"] for row in json.loads(bench.file.read_text())["rows"]] == [2]


def test_a_kept_output_is_not_quantized_again(bench: Bench) -> None:
    line = (*FAST, "--bits", "2", "--keep", str(bench.outputs))
    (first,) = bench.run(*line)
    bench.file.unlink()
    (again,) = bench.run(*line)
    assert again["processor_seconds"] is None
    assert again["texts"] == first["texts"]


def test_rows_of_other_conditions_are_refused(bench: Bench) -> None:
    bench.run(*FAST, "--bits", "2")
    with pytest.raises(SystemExit, match="has rows with dtype auto, not bfloat16"):
        bench.run(*FAST, "--bits", "2", "--dtype", "bfloat16")


def test_tables_have_ratios_to_the_reference(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = bench.run("--settings", "rtn", "fast", "--bits", "2", "3", "--nsamples", "4")
    *_, of_rtn, of_fast_row = capsys.readouterr().out.splitlines()
    name = list(rows[0]["texts"])[1]
    kl, of_fast = (row["texts"][name]["kl"] for row in rows[:2])
    top1, perplexity = 100 * rows[0]["texts"][name]["top1"], rows[0]["texts"][name]["perplexity"]
    assert f" | {1000 * kl:.1f} ({kl / of_fast:.2f}), {top1:.1f}, {perplexity:.2f} | " in of_rtn
    assert of_fast_row.count("(1.00)") == 4


def test_rtn_rounds_each_weight_to_nearest(script: ModuleType, model: Path, tmp_path: Path) -> None:
    with script.only_rounding():
        output, done = quantize(tmp_path, model, bits=3)
    original, found = load_file(model / "model.safetensors"), reader(output)
    assert len(done.layers) == 14
    for layer in done.layers:
        weight = original[f"{layer.name}.weight"].unflatten(1, (-1, 32))
        rounded = found.read(f"{layer.name}.weight").unflatten(1, (-1, 32))
        half_a_step = weight.abs().amax(-1, keepdim=True) / 7
        assert ((rounded - weight).abs() <= 1.01 * half_a_step).all(), layer.name
        assert layer.relative_error == layer.rtn_relative_error
