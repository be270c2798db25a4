"""Layers with useless inputs are located and refused, or rounded and counted on request."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gptq_cli.checkpoint.reader import TensorReader
from gptq_cli.checkpoint.source import open_checkpoint
from gptq_cli.config.layer import FaultPolicy, LayerConfig
from gptq_cli.errors import GateError
from gptq_cli.events import Event, LayerReport, Resumed, Warned, ignore
from gptq_cli.planning.plan import plan_run
from gptq_cli.quantization import layers
from gptq_cli.quantization.layers import Inputs, LayerSolver
from gptq_cli.quantization.run import QuantizeResult
from gptq_cli.quantization.run_state import Limits, Run
from gptq_cli.runtime.ranks import SINGLE_PROCESS
from gptq_cli.solver.factor import HessianFactor, NotPositiveDefiniteError, prepare
from gptq_cli.solver.hessian import HessianAccumulator
from gptq_cli.solver.quantized_linear import round_to_nearest
from tests.families import save_model, written
from tests.runs import calibration_ids, config, digest, messages, quantize_with_events, reader

BROKEN = "model.layers.1.self_attn.o_proj"
PLAIN: dict[str, object] = {
    "preset": "gptq",
    "dynamic": {"-:.*v_proj": {}},
    "batch_size": 4,
    "nsamples": 10,
}
PLAIN["dataset"] = written(("a quick brown fox " * 60 + "~ ") * 20)


def changed(model: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    return model


def overflowing(model: Path) -> list[int]:
    """Make the value projection of block 1 overflow on the rarest token of the text.

    Return the numbers of the windows that contain the token.
    """
    ids = calibration_ids(model, config(**PLAIN))
    where: dict[int, list[int]] = {}
    for token in ids.unique().tolist():
        where[token] = (ids == token).any(1).nonzero().flatten().tolist()
    token = min(where, key=lambda token: len(where[token]))
    assert len(where[token]) < len(ids)

    def change(tensors: dict[str, Tensor]) -> None:
        # The first channel belongs to the token alone, through the whole model.
        for name, tensor in tensors.items():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                tensor[0] = 0
        tensors["model.embed_tokens.weight"][:, 0] = 0
        tensors["model.embed_tokens.weight"][token, 0] = 1
        tensors["model.layers.1.self_attn.v_proj.weight"][5, 0] = 1e30

    changed(model, change)
    return where[token]


def run(model: Path, output: Path, **settings: object) -> tuple[QuantizeResult, list[Event]]:
    return quantize_with_events(model, output, **(PLAIN | settings))


@pytest.mark.parametrize("batch_size", [1, 3])
def test_an_error_names_the_first_window_with_infinite_inputs(
    batch_size: int, tmp_path: Path
) -> None:
    model = save_model(tmp_path / "model")
    windows = overflowing(model)
    assert windows[0] >= batch_size  # not the first that is looked at
    with pytest.raises(GateError) as caught:
        run(model, tmp_path / "out", batch_size=batch_size)
    first = windows[0] // batch_size * batch_size + 1
    last = min(first + batch_size - 1, 10)
    where = f"in window {first}" if batch_size == 1 else f"in one of the windows {first} to {last}"
    assert str(caught.value) == f"layer `{BROKEN}`: its inputs hold NaN or infinity, first {where}"
    assert (caught.value.code, caught.value.exit_code) == ("E_NUM_ACT", 4)
    assert caught.value.hint == "round such layers to nearest: --on-numeric-fault rtn"  # in float32


def test_an_error_in_a_layer_that_runs_twice_names_the_batch(tmp_path: Path) -> None:
    layer = plan_run(save_model(tmp_path / "model"), config(**PLAIN)).quantized[0]
    inputs = HessianAccumulator(layer.in_features, "cpu")
    for value in (1.0, 1.0, 1.0, 1.0, 1.0, float("nan"), 1.0, 1.0):
        inputs.add(torch.full((3, layer.in_features), value))
    batches = [torch.zeros(n, 8, dtype=torch.long) for n in (4, 4, 4, 2)]
    stream = SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32)
    run = SimpleNamespace(
        stream=stream,
        config=config(),
        batches=batches,
        report=ignore,
        limits=Limits(config()),
        ranks=SINGLE_PROCESS,
    )
    alone = LayerSolver(cast(Run, run))
    with pytest.raises(GateError, match="first in one of the windows 9 to 12"):
        list(alone.solve([[layer]], Inputs.of(inputs), SINGLE_PROCESS))


def test_rtn_rounds_and_counts_layers_with_infinite_inputs(
    tmp_path: Path,
) -> None:
    model = save_model(tmp_path / "model")
    overflowing(model)
    result, events = run(model, tmp_path / "out", on_numeric_fault="rtn")
    rounded = [layer.name for layer in result.layers if layer.fallback == "inputs"]
    assert rounded == [BROKEN]  # the norm after it makes its outputs finite again
    for name, text in zip(rounded, messages(events, "W_NUM_FALLBACK"), strict=True):
        assert f"`{name}`" in text
    source = TensorReader(open_checkpoint(model))
    for name in rounded:
        nearest = round_to_nearest(source.read(f"{name}.weight"), config(**PLAIN).base)
        assert torch.equal(reader(tmp_path / "out").linear(name).codes, nearest.codes)


def test_a_run_stopped_by_infinite_inputs_resumes_with_rtn(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    overflowing(model)
    with pytest.raises(GateError):
        run(model, tmp_path / "out")
    result, _ = run(model, tmp_path / "out", on_numeric_fault="rtn")
    assert result.resumed_blocks == 1
    run(model, tmp_path / "whole", on_numeric_fault="rtn")
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")


def refusing(monkeypatch: pytest.MonkeyPatch, in_features: int) -> None:
    """Refuse a factor for each Hessian of this size that has seen a token."""

    def fails(hessian: Tensor, settings: object, tokens: list[int]) -> HessianFactor:
        if hessian.shape[-1] == in_features and any(tokens):
            raise NotPositiveDefiniteError(0.4)
        return prepare(hessian, settings, tokens)  # type: ignore[arg-type]

    monkeypatch.setattr(layers, "prepare", fails)


def test_rtn_rounds_layers_whose_hessian_has_no_factor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_model(tmp_path / "model", hidden_size=64, intermediate_size=96)
    refusing(monkeypatch, 96)
    with pytest.raises(
        GateError, match=r"`model\.layers\.0\.mlp\.down_proj`.*damp_percent 0\.4"
    ) as caught:
        run(model, tmp_path / "out")
    assert (caught.value.code, caught.value.exit_code) == ("E_NUM_HESSIAN", 4)
    assert "--on-numeric-fault rtn" in (caught.value.hint or "")
    result, events = run(model, tmp_path / "out", on_numeric_fault="rtn")
    rounded = [layer.name for layer in result.layers if layer.fallback == "hessian"]
    assert rounded == [f"model.layers.{block}.mlp.down_proj" for block in range(3)]
    warned = [
        event.code for event in events if isinstance(event, Warned) and event.code != "W_CFG_FUSED"
    ]
    assert warned == ["W_NUM_FALLBACK"] * 3
    for layer in result.layers:
        assert layer.fallback or layer.relative_error < layer.rtn_relative_error
    assert result.to_json()["layers"][6]["fallback"] is None


def test_more_fallbacks_than_allowed_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_model(tmp_path / "model", hidden_size=64, intermediate_size=96)
    refusing(monkeypatch, 96)
    with pytest.raises(GateError) as caught:
        run(model, tmp_path / "out", on_numeric_fault="rtn", max_fallbacks=1)
    assert str(caught.value) == (
        "2 layers had to be rounded to nearest, the last `model.layers.1.mlp.down_proj`, "
        "but --max-fallbacks allows 1"
    )
    assert (caught.value.code, caught.value.exit_code) == ("E_NUM_FALLBACKS", 4)
    assert caught.value.hint == "use more or other calibration text, or allow more"
    assert not (tmp_path / "out").exists()
    # One fallback comes from a finished block and two from this call.
    with pytest.raises(GateError, match=r"3 layers .* allows 2"):
        run(model, tmp_path / "out", on_numeric_fault="rtn", max_fallbacks=2)
    result, events = run(model, tmp_path / "out", on_numeric_fault="rtn", max_fallbacks=3)
    assert [event.index for event in events if isinstance(event, Resumed)] == [2]
    assert sum(layer.fallback is not None for layer in result.layers) == 3


def test_a_stricter_policy_rejects_finished_fallbacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_model(tmp_path / "model", hidden_size=64, intermediate_size=96)
    refusing(monkeypatch, 96)
    with pytest.raises(GateError):
        run(model, tmp_path / "out", on_numeric_fault="rtn", max_fallbacks=1)
    with pytest.raises(
        GateError,
        match=r"an earlier call rounded `model\.layers\.0\.mlp\.down_proj` to .* is error now",
    ) as caught:
        run(model, tmp_path / "out")
    assert (caught.value.code, caught.value.hint) == (
        "E_NUM_FALLBACKS",
        "use --on-numeric-fault rtn, or --resume never",
    )
    run(model, tmp_path / "out", on_numeric_fault="rtn")
    with pytest.raises(GateError, match="allows 0"):  # done before, and still too many
        run(model, tmp_path / "out", on_numeric_fault="rtn", max_fallbacks=0)


def test_fewer_tokens_than_inputs_cause_one_warning(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    _, events = run(model, tmp_path / "out", nsamples=3, seqlen=16, batch_size=1)
    assert messages(events, "W_NUM_TOKENS") == [
        "layer `model.layers.0.self_attn.q_proj` saw 48 calibration tokens "
        "for 64 inputs; others may have as few"
    ]


def test_a_layer_solved_twice_counts_as_one_fallback() -> None:
    limits = Limits(config(max_fallbacks=2))
    solved = [
        LayerReport(f"layer {n}", 0, 4, 32, 0.1, 0.1, 0.01, 0, 0, 9, 1.0, "tokens")
        for n in range(3)
    ]
    for layer in (0, 1, 0, 1):
        limits.check_fallbacks([solved[layer]])
    with pytest.raises(
        GateError, match=r"3 layers had to be rounded to nearest, the last `layer 2`, .* allows 2"
    ):
        limits.check_fallbacks([solved[2]])


def test_a_layer_without_a_hessian_forgets_what_it_would_follow() -> None:
    solver = LayerSolver.__new__(LayerSolver)
    solver.policy = FaultPolicy(on_numeric_fault="rtn")
    known = torch.ones(2, 8, 8)
    unusable = Inputs(known[:1] * float("nan"), [list(known)], list(known), [100], lambda _: None)
    usable = solver._usable(unusable, LayerConfig(group_size=8, asymmetric_calibration=1.0))
    assert usable.fallbacks == ["inputs"]
    assert not any(shift.any() for shift in usable.shifts[0])
    assert usable.drifts == []
