"""Layers that share an input are solved as rows of one layer, but are reported separately."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gptq_cli.checkpoint.source import open_checkpoint
from gptq_cli.errors import GateError, InputError
from gptq_cli.events import Warned
from gptq_cli.planning.estimate import ROWS_OF_A_PART
from gptq_cli.planning.plan import plan_checkpoint
from gptq_cli.planning.run_plan import LayerPlan
from gptq_cli.quantization.layers import Rows, located, of_one_configuration, row_parts
from gptq_cli.solver.factor import NonFiniteHessianError, prepare
from gptq_cli.solver.grid import ScaleRangeError
from gptq_cli.solver.solve import Solution, solve, solve_together
from tests.families import save_model
from tests.runs import config, quantize, quantize_with_events, reader
from tests.solver.samples import ORDERS, correlated_layer, layer_config


@pytest.mark.parametrize("order", ORDERS)
def test_layers_solved_together_equal_layers_solved_alone(order: str) -> None:
    (first, hessian), (second, _), (third, _) = (
        correlated_layer(rows, 96, rows) for rows in (20, 7, 12)
    )
    settings = layer_config(order, bits=3, group_size=24, signed_scales=True, refine_sweeps=1)
    prepared = prepare(hessian, settings)
    together = solve_together([first, second, third], hessian, prepared, settings)
    for weight, found in zip((first, second, third), together, strict=True):
        alone = solve(weight, hessian, prepared, settings)
        assert torch.equal(found.quantized.codes, alone.quantized.codes)
        assert torch.equal(found.quantized.scales, alone.quantized.scales)
        assert torch.equal(found.quantized.zeros, alone.quantized.zeros)
        assert found.relative_error == pytest.approx(alone.relative_error, rel=1e-12)
        assert found.rtn_relative_error == pytest.approx(alone.rtn_relative_error, rel=1e-12)


@pytest.fixture
def layers(tmp_path: Path) -> list[LayerPlan]:
    """The seven layers of one block; k_proj has bits of its own."""
    source = open_checkpoint(save_model(tmp_path / "model"))
    plan = plan_checkpoint(source, config(dynamic={r"+:.*k_proj": {"bits": 8}}))
    return [layer for layer in plan.quantized if layer.block == 1]


def names(batches: Sequence[Sequence[LayerPlan]]) -> list[str]:
    return [" ".join(layer.name.rpartition(".")[2] for layer in batch) for batch in batches]


def test_layers_with_equal_settings_form_one_batch(layers: list[LayerPlan]) -> None:
    named = {layer.name.rpartition(".")[2]: layer for layer in layers}
    attention = [named[name] for name in ("q_proj", "k_proj", "v_proj")]
    assert names(of_one_configuration(attention)) == ["q_proj v_proj", "k_proj"]


def test_parts_of_rows_span_layers(layers: list[LayerPlan]) -> None:
    a, b, c = (
        replace(layers[0], name=name, out_features=rows)
        for name, rows in {"a": 5, "b": 2, "c": 9}.items()
    )
    assert row_parts([a, b, c], 4) == [
        [Rows(a, 0, 4)],
        [Rows(a, 4, 5), Rows(b, 0, 2), Rows(c, 0, 1)],
        [Rows(c, 1, 5)],
        [Rows(c, 5, 9)],
    ]
    assert row_parts([a, b], 7) == [[Rows(a, 0, 5), Rows(b, 0, 2)]]


@pytest.mark.parametrize(
    ("row", "owner"), [(0, "a"), (4, "a"), (5, "b"), (7, "b"), (8, "c"), (19, "c")]
)
def test_a_scale_range_error_names_the_layer_of_its_row(
    row: int, owner: str, layers: list[LayerPlan]
) -> None:
    together = [
        replace(layers[0], name=name, out_features=rows)
        for name, rows in {"a": 5, "b": 3, "c": 12}.items()
    ]
    with (
        pytest.raises(InputError, match=rf"layer `{owner}`") as caught,
        located(together, [5, 3, 12]),
    ):
        raise ScaleRangeError(row)
    assert caught.value.code == "E_CKPT_NONFINITE"


@pytest.mark.parametrize(
    ("dtype", "advises"),
    [(torch.float16, True), (torch.bfloat16, True), (torch.float32, False)],
)
def test_inputs_that_are_not_finite_bring_advice_that_was_not_followed_yet(
    dtype: torch.dtype, advises: bool, layers: list[LayerPlan]
) -> None:
    with pytest.raises(GateError) as caught, located(layers, dtype=dtype):
        raise NonFiniteHessianError
    hint = caught.value.hint or ""
    assert ("--dtype float32" in hint) is advises
    assert hint.endswith("round such layers to nearest: --on-numeric-fault rtn")


@pytest.mark.parametrize("order", ["group aware", "static group aware"])
def test_an_error_names_the_first_bad_row(order: str) -> None:
    (first, hessian), (second, _) = (correlated_layer(rows, 96, rows) for rows in (20, 7))
    second[[3, 5], 40] = float("nan")
    settings = layer_config(order, group_size=24)
    with pytest.raises(ScaleRangeError, match="row 23 ") as caught:
        solve_together([first, second], hessian, prepare(hessian, settings), settings)
    assert caught.value.row == 23


@pytest.mark.parametrize("strength", [0.0, 0.5])
def test_a_run_equals_solving_each_layer_alone(
    strength: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"asymmetric_calibration": strength}
    model, usual = save_model(tmp_path / "model"), solve_together
    rows: list[list[int]] = []

    def note(weights: Sequence[Tensor], *arguments: object) -> list[Solution]:
        rows.append([len(weight) for weight in weights])
        return usual(weights, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr("gptq_cli.quantization.layers.solve_together", note)
    output, result = quantize(tmp_path, model, **settings)
    assert rows == [[128, 64, 64], [64], [128, 128], [64]] * 3
    monkeypatch.setitem(ROWS_OF_A_PART, "cpu", (48, 48))
    rows.clear()
    alone, expected = quantize(tmp_path, model, **settings)
    attention, output_or_down = [[48], [48], [32, 16], [48], [48], [16]], [[48], [16]]
    gate_and_up = [[48], [48], [32, 16], [48], [48], [16]]
    assert rows == [*attention, *output_or_down, *gate_and_up, *output_or_down] * 3
    assert [layer.name for layer in result.layers] == [layer.name for layer in expected.layers]
    for found, other in zip(result.layers, expected.layers, strict=True):
        assert found.relative_error == pytest.approx(other.relative_error, rel=1e-3)
        assert found.seconds > 0
        ours, theirs = (reader(directory).linear(found.name) for directory in (output, alone))
        assert (ours.codes == theirs.codes).double().mean() > 0.99


def scaled(model: Path, **factors: float) -> Path:
    """Multiply the weights of layers of the second block by `factors`, keyed by `v_proj` etc."""
    tensors = load_file(model / "model.safetensors")
    for name in tensors:
        layer = name.removesuffix(".weight").rpartition(".")[2]
        if ".layers.1." in name and layer in factors:
            tensors[name] = tensors[name] * factors[layer]
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    return model


def warned(model: Path, output: Path, **changes: object) -> list[str]:
    _, events = quantize_with_events(model, output, **changes)
    return [f"{event.code} {event.message}" for event in events if isinstance(event, Warned)]


@pytest.mark.parametrize("preset", ["gptq", "best"])
def test_a_warning_names_a_layer_that_loses_its_weights(preset: str, tmp_path: Path) -> None:
    model = scaled(save_model(tmp_path / "model"), v_proj=2.0**-27)
    first, *others = warned(model, tmp_path / "out", preset=preset)
    name = "model.layers.1.self_attn.v_proj"
    expected = (
        rf"W_NUM_SCALES layer `{name}` has so small weights that 128 of 128 scales "
        r"are held at 2\^-24, the smallest number of float16; its relative error is (1|0\.9)"
    )
    assert re.match(expected, first)
    for other in others:  # its outputs are zero, and the next layer is not to blame
        assert other.startswith("W_NUM_DEAD layer `model.layers.1.self_attn.o_proj`")
        assert other.endswith(f"their weights become zero; `{name}` before it has lost weights")
    assert others


def test_subnormal_scales_cause_one_warning(tmp_path: Path) -> None:
    model = scaled(save_model(tmp_path / "model"), v_proj=2.0**-12, up_proj=2.0**-12)
    (told,) = warned(model, tmp_path / "out")
    assert told.startswith(
        "W_NUM_SCALES layer `model.layers.1.self_attn.v_proj` has so small weights that 128 "
    )
    assert "of 128 scales are below 2^-14, which makes them subnormal in float16" in told


def test_groups_of_zeros_cause_no_scale_warning(tmp_path: Path) -> None:
    model = scaled(save_model(tmp_path / "model"), up_proj=0.0, k_proj=0.0)
    assert warned(model, tmp_path / "out") == [
        "W_NUM_DEAD layer `model.layers.1.mlp.down_proj`: "
        "128 of 128 inputs were always zero, their weights become zero"
    ]


@pytest.mark.parametrize("layer", ["q_proj", "v_proj"])
def test_an_error_names_a_layer_that_decodes_beyond_float16(layer: str, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors[f"model.layers.0.self_attn.{layer}.weight"][3, 4] = -65504
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        InputError, match=rf"layer `model.layers.0.self_attn.{layer}`: .*beyond the range"
    ) as caught:
        quantize(tmp_path, model, preset="fast")
    assert (caught.value.code, caught.value.exit_code) == ("E_CKPT_NONFINITE", 3)
