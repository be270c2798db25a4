"""The harm of units, compared with the whole model of transformers; experts, resume, processes."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from gptq_cli.allocation.harms import REFERENCE, Measurement
from gptq_cli.allocation.measure import probe_shape
from gptq_cli.allocation.run import QUICK
from gptq_cli.allocation.saved import read_measurement
from gptq_cli.checkpoint.source import open_checkpoint
from gptq_cli.config.layer import LayerConfig
from gptq_cli.config.schema import QuantizeConfig
from gptq_cli.events import BlockFinished, Event, Warned, ignore
from gptq_cli.quantization.run import calibrate
from gptq_cli.quantization.run_state import SavingTimes
from gptq_cli.runtime.ranks import SINGLE_PROCESS
from gptq_cli.solver.factor import prepare
from gptq_cli.solver.hessian import HessianAccumulator
from gptq_cli.solver.solve import solve
from gptq_cli.storage.manifest import sealed
from tests.allocation.measuring import SIZES, figures, goal, measure
from tests.allocation.processes import measure_together
from tests.architectures import build
from tests.disks import Killed
from tests.families import save, save_model, texts
from tests.runs import calibration_ids, config, digest


def whole_model(directory: Path) -> PreTrainedModel:
    """Return the model of transformers in float32."""
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def probe_of(model: Path, n_units: int) -> Tensor:
    """Return the tokens of the probe of a measurement with `SIZES`."""
    windows, length = probe_shape(SIZES["nsamples"] * SIZES["seqlen"], n_units, SIZES["seqlen"])
    return calibration_ids(model, config(nsamples=windows, seqlen=length, batch_size=1, seed=1))


def rounded(
    model: PreTrainedModel,
    batches: Sequence[Tensor],
    name: str,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return the weight of a linear as quick rounding leaves it, given inputs of the whole model.

    The inputs are those of the unquantized model on `batches` of ids, whose linears compute in
    `dtype`.
    """
    linear = model.get_submodule(name)
    hessian = HessianAccumulator(linear.in_features, "cpu")
    hooks = [linear.register_forward_pre_hook(lambda _, inputs: hessian.add(inputs[0]))]

    def in_dtype(module: nn.Linear, inputs: tuple[Tensor], _: Tensor) -> Tensor:
        return (inputs[0].to(dtype) @ module.weight.to(dtype).T).to(inputs[0].dtype)

    for module in model.modules():
        if isinstance(module, nn.Linear):
            hooks.append(module.register_forward_hook(in_dtype))
    for batch in batches:
        model(batch)
    for hook in hooks:
        hook.remove()
    base = config(bits=REFERENCE, **QUICK).base
    assert isinstance(base, LayerConfig)
    factor = prepare(hessian.hessian, base, hessian.tokens)
    return solve(linear.weight.data, hessian.hessian, factor, base).quantized.dequantize()


def divergence(model: PreTrainedModel, probe: Tensor, weights: dict[str, Tensor]) -> float:
    """Return the mean KL on the probe of the model with other `weights`."""
    wanted = model(probe).logits[:, :-1].log_softmax(-1)
    before = {}
    for name, weight in weights.items():
        parameter = model.get_submodule(name).weight
        before[name] = parameter.data.clone()
        parameter.data.copy_(weight)
    got = model(probe).logits[:, :-1].log_softmax(-1)
    for name, weight in before.items():
        model.get_submodule(name).weight.data.copy_(weight)
    return float((wanted.exp() * (wanted - got)).sum(-1).mean())


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a model with tied embeddings."""
    return save_model(tmp_path_factory.mktemp("qwen3") / "model", "qwen3")


@torch.no_grad()
def test_harms_are_those_of_the_whole_model(qwen3: Path, tmp_path: Path) -> None:
    measured = measure(qwen3, goal(), tmp_path / "a.yaml")
    found = figures(tmp_path / "a.yaml")
    model = whole_model(qwen3)
    batches = calibration_ids(qwen3, config(**SIZES)).split(SIZES["batch_size"])
    probe = probe_of(qwen3, len(measured.units))

    def harm(layers: Iterable[str]) -> float:
        weights = {name: rounded(model, batches, name) for name in layers}
        return divergence(model, probe, weights)

    for unit in measured.units[:5]:
        assert found["kl"][unit.name] == pytest.approx(harm(unit.layers), rel=1e-3)
    layers = [*chain.from_iterable(unit.layers for unit in measured.units)]
    assert found["uniform"] == pytest.approx(harm(layers), rel=1e-3)
    total = sum(harms[REFERENCE] for harms in measured.harms)
    assert total == pytest.approx(found["uniform"])


@torch.no_grad()
@pytest.mark.parametrize("wanted", ["auto", "float32"])
def test_calibration_alone_runs_in_16_bits(wanted: str, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", "qwen3", dtype=torch.bfloat16)
    dtype, other = torch.bfloat16, torch.float32
    if wanted == "float32":
        dtype, other = other, dtype
    measured = measure(model, goal(dtype=wanted), tmp_path / "a.yaml")
    found = figures(tmp_path / "a.yaml")["kl"]
    whole = whole_model(model)
    batches = calibration_ids(model, config(**SIZES)).split(SIZES["batch_size"])
    probe = probe_of(model, len(measured.units))
    units = measured.units[:7]

    def harms(calibrated: torch.dtype) -> list[float]:
        values = []
        for unit in units:
            weights = {name: rounded(whole, batches, name, calibrated) for name in unit.layers}
            values.append(divergence(whole, probe, weights))
        return values

    assert [found[unit.name] for unit in units] == pytest.approx(harms(dtype), rel=1e-3)
    assert harms(other) != pytest.approx(harms(dtype), rel=1e-3)


def test_sums_beside_linears_keep_their_dtype(tmp_path: Path) -> None:
    model = save(build("dbrx").bfloat16(), tmp_path / "model")  # adds outputs of experts in place
    measured = measure(model, goal(moe_uncovered="rtn", unfit="keep"), tmp_path / "a.yaml")
    assert len(measured.units) == 8
    assert all(harms[2] > harms[4] > 0 for harms in measured.harms)


@torch.no_grad()
def test_long_windows_are_compared_one_by_one(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", "qwen3", max_position_embeddings=256)
    sizes = {"nsamples": 13, "seqlen": 256, "batch_size": 13}
    measured = measure(model, goal(**sizes, target="sglang@0.5.19"), tmp_path / "a.yaml")
    found = figures(tmp_path / "a.yaml")["kl"]
    whole, batches = whole_model(model), [calibration_ids(model, config(**sizes))]
    shape = probe_shape(13 * 256, len(measured.units), 256)
    assert shape == (2, 138)  # 256 tokens are compared together at most
    probe = calibration_ids(model, config(nsamples=2, seqlen=138, batch_size=1, seed=1))
    for unit in measured.units[:2]:
        weights = {name: rounded(whole, batches, name) for name in unit.layers}
        assert found[unit.name] == pytest.approx(divergence(whole, probe, weights), rel=1e-3)


@torch.no_grad()
def test_harms_of_documents_count_no_padding(qwen3: Path, tmp_path: Path) -> None:
    rows = [json.dumps({"text": texts(12 + 5 * number, number)[0]}) for number in range(24)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    text = {"dataset": str(tmp_path / "rows.jsonl"), "pack": False}
    measured = measure(qwen3, goal(**text), tmp_path / "a.yaml")
    found = figures(tmp_path / "a.yaml")
    model = whole_model(qwen3)
    batches = documents(qwen3, config(**SIZES, **text))
    assert len({len(ids[0]) for ids in batches}) > 1
    n_tokens = SIZES["nsamples"] * SIZES["seqlen"]
    windows, length = probe_shape(n_tokens, len(measured.units), SIZES["seqlen"])
    sizes = {"nsamples": windows, "seqlen": length, "batch_size": 1, "seed": 1}
    probe = documents(qwen3, config(**sizes, **text))
    for unit in measured.units[:3]:
        weights = {name: rounded(model, batches, name) for name in unit.layers}
        harm = total = 0
        for ids in probe:
            harm += divergence(model, ids, weights) * (ids.numel() - 1)
            total += ids.numel() - 1
        assert found["kl"][unit.name] == pytest.approx(harm / total, rel=1e-3)


def documents(model: Path, settings: QuantizeConfig) -> list[Tensor]:
    """Return the token ids [1, length] of each document of a calibration without packing."""
    windows = calibrate(open_checkpoint(model), settings, ignore, SINGLE_PROCESS).windows
    assert windows.lengths is not None
    found = []
    for ids, length in zip(windows.ids, windows.lengths, strict=True):
        found.append(ids[None, :length])
    return found


@torch.no_grad()
def test_a_quantized_head_is_a_unit_of_its_own(qwen3: Path, tmp_path: Path) -> None:
    measured = measure(qwen3, goal(lm_head=True), tmp_path / "a.yaml")
    (head,) = [unit for unit in measured.units if unit.name == "lm_head"]
    model = whole_model(qwen3)
    batches = calibration_ids(qwen3, config(**SIZES)).split(SIZES["batch_size"])
    probe = probe_of(qwen3, len(measured.units))
    embeddings = model.get_input_embeddings().weight.data.clone()
    weight = rounded(model, batches, "lm_head")
    wanted = model(probe).logits[:, :-1].log_softmax(-1)
    hidden = model.model(probe).last_hidden_state[:, :-1]
    got = (hidden @ weight.T).log_softmax(-1)
    expected = float((wanted.exp() * (wanted - got)).sum(-1).mean())
    found = figures(tmp_path / "a.yaml")["kl"]["lm_head"]
    assert found == pytest.approx(expected, rel=1e-3)
    assert torch.equal(model.get_input_embeddings().weight.data, embeddings)
    assert head.layers == ("lm_head",)


def test_all_experts_of_a_block_are_one_unit(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", "qwen3_moe")
    wanted = goal(bits=2.5, moe_uncovered="rtn")
    measured = measure(model, wanted, tmp_path / "a.yaml")
    experts = [unit for unit in measured.units if unit.kind == "mlp.experts"]
    assert [len(unit.layers) for unit in experts] == [15, 15]
    chosen = measured.configured(measured.choose(wanted).allocation.widths)
    plan = measured.plan_of(chosen)
    for unit in experts:
        assert len({chosen.choose(name).config for name in unit.layers}) == 1
    assert plan.split_experts == []
    assert all(harms[2] > harms[4] > 0 for harms in measured.harms)


def kill_after(block: int) -> object:
    """Return a report that kills the measurement after a block."""

    def stop(event: Event) -> None:
        if isinstance(event, BlockFinished) and event.index == block:
            raise Killed

    return stop


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text"])
def test_a_killed_measurement_resumes_to_the_same_bytes(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_model(tmp_path / "model", family)
    monkeypatch.setattr(SavingTimes, "is_due", lambda *_: True)
    measure(model, goal(), tmp_path / "whole.yaml")
    file = tmp_path / "a.yaml"
    for block in (0, 1):
        with pytest.raises(Killed):
            measure(model, goal(), file, kill_after(block))
    events: list[Event] = []
    measure(model, goal(), file, events.append)
    finished = [event.index for event in events if isinstance(event, BlockFinished)]
    assert finished == [2]
    assert figures(file) == figures(tmp_path / "whole.yaml")
    assert not (tmp_path / ".a.yaml.gptq-work").exists()


def test_a_finished_measurement_serves_another_goal(qwen3: Path, tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    first = measure(qwen3, goal(), file)
    before = digest(tmp_path)
    again = measure(qwen3, goal(bits=2.75, protect=".*v_proj"), file)
    assert (first.already_done, again.already_done) == (False, True)
    assert digest(tmp_path) == before
    other = measure(qwen3, goal(seed=5), file)
    assert not other.already_done
    assert digest(tmp_path) != before


def test_units_for_another_engine_are_measured_anew(qwen3: Path, tmp_path: Path) -> None:
    file, events = tmp_path / "a.yaml", list[Event]()
    apart = measure(qwen3, goal(), file)
    fused = measure(qwen3, goal(target="sglang@0.5.19"), file, events.append)
    assert (apart.already_done, fused.already_done) == (False, False)
    assert (len(apart.units), len(fused.units)) == (21, 12)
    assert not [event for event in events if isinstance(event, Warned)]


@pytest.fixture(scope="module")
def finished(qwen3: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return the content of the file of a finished measurement."""
    file = tmp_path_factory.mktemp("finished") / "a.yaml"
    measure(qwen3, goal(), file)
    content: dict[str, Any] = json.loads(file.with_suffix(".json").read_text())
    return content


@pytest.mark.parametrize(
    "change",
    [
        None,
        [1],
        {},
        {"extra": 1},
        {"kl": None},
        {"kl": {}},
        {"kl": [1]},
        {"uniform": "x"},
        {"uniform": True},
        {"uniform": math.nan},
        {"uniform": -1},
        {"uniform": 1e308},
        {"uniform": math.inf},
    ],
    ids=str,
)
def test_a_measurement_without_usable_figures_is_damaged(
    change: Any, finished: dict[str, Any], tmp_path: Path
) -> None:
    measured, units = finished["measured"], [*finished["measured"]["kl"]]
    planted = change
    if isinstance(change, dict) and change:
        planted = measured | change
    text = json.dumps(sealed(finished | {"measured": planted}))
    file = tmp_path / "a.json"
    file.write_text(text)
    events: list[Event] = []
    assert read_measurement([file], finished["identity"], units, events.append) is None
    text = f"`{file}` has no usable figures: the run measures again"
    assert events == [Warned("W_RESUME_DAMAGED", text)]
    planted = measured | {"kl": measured["kl"] | {units[1]: "x"}}
    file.write_text(json.dumps(sealed(finished | {"measured": planted})))
    assert read_measurement([file], finished["identity"], units) is None
    file.write_text(json.dumps(finished))
    found = read_measurement([file], finished["identity"], units)
    assert found == Measurement(**measured)


def test_several_processes_measure_the_same(qwen3: Path, tmp_path: Path) -> None:
    measure(qwen3, goal(batch_size=1), tmp_path / "one.yaml")
    measure_together(2, qwen3, tmp_path / "two.yaml", goal(batch_size=1))
    assert figures(tmp_path / "two.yaml") == figures(tmp_path / "one.yaml")
