"""`quantize_checkpoint` end to end on tiny models, against a slow whole-model reference."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from gptq_cli.api import verify
from gptq_cli.checkpoint.layout import PARTS
from gptq_cli.checkpoint.reader import DequantizingReader, TensorReader
from gptq_cli.checkpoint.source import open_checkpoint
from gptq_cli.config.schema import QuantizeConfig
from gptq_cli.errors import GateError, InputError
from gptq_cli.events import BlockFinished, BlockStarted, Event, LayerSolved, RunPlanned, Warned
from gptq_cli.planning.plan import plan_run
from gptq_cli.quantization import run
from gptq_cli.quantization.run import quantize_checkpoint
from gptq_cli.solver import hessian as hessian_module
from tests.families import FAMILIES, save_model
from tests.reference import follow, gptq, limited
from tests.runs import config, digest, quantize, quantize_with_events, reader


def input_of(whole: PreTrainedModel, name: str, windows: Tensor) -> Tensor:
    """Return every token [tokens, I] that linear `name` sees, in float64."""
    seen: list[Tensor] = []
    hook = whole.get_submodule(name).register_forward_pre_hook(
        lambda _, args: seen.append(args[0].flatten(0, 1))
    )
    with torch.no_grad():
        whole(input_ids=windows, use_cache=False)
    hook.remove()
    return seen[0].double()


def described(output: Path) -> dict[str, Any]:
    """Return the settings that config.json declares for readers."""
    content: dict[str, Any] = json.loads((output / "config.json").read_text())
    settings: dict[str, Any] = content["quantization_config"]
    return settings


LONGEST = 1.01  # these models have no massive tokens, so a third of their tokens stand for them
RESIDUALS = {
    "self_attn.o_proj": "input_layernorm",
    "mlp.down_proj": "post_attention_layernorm",
}
HALF: dict[str, object] = {"asymmetric_calibration": 0.5}


def halves(n_windows: int, settings: QuantizeConfig) -> Tensor:
    """Return 1 for windows of one half of the text and -1 for the other, batch by batch."""
    sides: list[int] = []
    while len(sides) < n_windows:
        n = min(settings.batch_size, n_windows - len(sides))
        assert n % 2 == 0
        sides += [1] * (n // 2) + [-1] * (n // 2)
    return torch.tensor(sides)


def drift_of(
    whole: PreTrainedModel,
    untouched: PreTrainedModel,
    block: str,
    linear: str,
    windows: Tensor,
    settings: QuantizeConfig,
) -> Tensor:
    """Return for every token what the hidden states lack that `linear` writes into, or zeros."""
    norm = RESIDUALS.get(linear)
    if norm is None:
        return torch.zeros(windows.numel(), 1).double()
    wanted, found = [input_of(each, f"{block}.{norm}", windows) for each in (untouched, whole)]
    if settings.limit_massive_tokens:
        limited(wanted, [found], settings.batch_size * settings.seqlen, LONGEST)
    return wanted - found


def slow_quantize(
    model: Path,
    windows: Tensor,
    settings: QuantizeConfig,
    stages: list[list[str]],
    ours: DequantizingReader,
) -> dict[str, Tensor]:
    """Return the codes of every layer; each stage runs the whole model anew.

    Hessians are float64. Later stages see the quantized weights of `ours`: if they saw those of
    this function, one rounded tie would change many codes of all layers after it. The outputs of
    o_proj and down_proj are added to the inputs of the norms in `RESIDUALS`.
    """
    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    untouched = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    modules = dict(whole.named_modules())
    n_together = settings.batch_size * settings.seqlen
    codes = {}
    for block in range(len(whole.model.layers)):
        for names in stages:
            place = f"model.layers.{block}"
            full = [f"{place}.{name}" for name in names]
            tokens = input_of(whole, full[0], windows)
            originals = input_of(untouched, full[0], windows)
            drift = drift_of(whole, untouched, place, names[0], windows, settings)
            if settings.limit_massive_tokens:
                limited(tokens, [originals, drift], n_together, LONGEST)
            hessian = tokens.T @ tokens
            sides = halves(len(windows), settings).repeat_interleave(settings.seqlen)
            for name in full:
                weight = modules[name].weight.detach()
                if settings.asymmetric_calibration:
                    weight = follow(weight.double(), tokens, originals, settings.base, sides, drift)
                codes[name] = gptq(weight, hessian, settings.base, len(tokens)).codes
            for name in full:
                modules[name].weight.data = ours.linear(name).dequantize(torch.float32)
    return codes


@pytest.mark.parametrize(
    "settings",
    [
        {"preset": "gptq"},
        {"preset": "gptq", "bits": 3, "sym": False},
        {"preset": "gptq", "desc_act": True},
        {"preset": "act-order", "bits": 2},
        {"preset": "gptq", "act_group_aware": False},
        {"preset": "fast"},
        {"preset": "fast", "scale_search": "mse"},
        {"preset": "fast", "limit_massive_tokens": False},
        {"preset": "fast", "asymmetric_calibration": 0.75},
        {"preset": "fast", "asymmetric_calibration": "auto"},
        {"preset": "gptq", "bits": 3, "asymmetric_calibration": 0.25},
    ],
    ids=str,
)
def test_codes_equal_a_stage_by_stage_whole_model_reference(
    settings: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_model(tmp_path / "model", num_hidden_layers=2)
    seen: list[Tensor] = []

    def spy(*args: object, **kwargs: object) -> object:
        calibration = original(*args, **kwargs)
        seen.append(torch.as_tensor(calibration.windows.ids))
        return calibration

    original = run.calibrate
    monkeypatch.setattr(run, "calibrate", spy)
    monkeypatch.setattr(hessian_module, "LONGEST", LONGEST)
    output, _ = quantize(tmp_path, model, **settings)
    attention, mlp = "self_attn", "mlp"
    stages = [
        [f"{attention}.{name}_proj" for name in "qkv"],
        [f"{attention}.o_proj"],
        [f"{mlp}.gate_proj", f"{mlp}.up_proj"],
        [f"{mlp}.down_proj"],
    ]
    ours = reader(output)
    expected = slow_quantize(model, seen[0], config(**settings), stages, ours)
    assert len(expected) == 14
    for name, codes in expected.items():
        different = (ours.linear(name).codes.double() != codes).double().mean()
        # Forwards in float32 and sums in float64 differ in a few ties.
        assert different < 0.01, f"{name}: {different:.2%} of the codes differ"


def test_the_report_has_the_strength_with_which_each_layer_follows(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", num_hidden_layers=2)
    strengths = {}
    for name, settings in {"auto": {"preset": "best"}, "none": {}, "half": HALF}.items():
        _, result = quantize(tmp_path, model, bits=2, **settings)
        strengths[name] = [layer.asymmetric_calibration for layer in result.layers]
    assert strengths["none"] == [None] * 14
    assert strengths["half"] == [0.5] * 14
    found = strengths["auto"]
    assert found[:3] == [0.0] * 3  # q, k and v of the first block see unchanged inputs
    assert min(found[3:]) < 0.9
    assert max(found[3:]) > 0.1
    assert all(0 <= strength <= 1 for strength in found)


def test_stages_see_the_original_block_without_true_sequential(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", num_hidden_layers=2)
    sequential, _ = quantize(tmp_path, model, bits=2)
    together, _ = quantize(tmp_path, model, bits=2, true_sequential=False)
    first, last = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"
    assert torch.equal(reader(sequential).linear(first).codes, reader(together).linear(first).codes)
    assert not torch.equal(
        reader(sequential).linear(last).codes, reader(together).linear(last).codes
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_quantized_and_reads_back(family: str, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", family, dtype=torch.bfloat16)
    output, result = quantize(tmp_path, model)
    source, written = open_checkpoint(model), open_checkpoint(output)
    quantized = {layer.name for layer in result.layers}
    assert len(quantized) == len(result.layers) >= 12
    original, ours = TensorReader(source), reader(output)
    largest = 0.3 if family == "opt" else 0.2  # with few tokens, weights follow their loss
    expected = {f"{name}.{part}" for name in quantized for part in PARTS}
    for name in source.tensors:
        if name.removesuffix(".weight") in quantized:
            weight = original.read(name).float()
            assert (ours.read(name) - weight).norm() < largest * weight.norm()
        else:
            assert torch.equal(TensorReader(written).read(name), original.read(name))
            expected.add(name)
    assert set(written.tensors) == expected
    verified = verify(output, full=True)
    assert (verified.defects, verified.unchecked) == ((), "")


def test_equal_runs_write_equal_bytes_and_another_seed_does_not(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    first, _ = quantize(tmp_path, model)
    second, _ = quantize(tmp_path, model)
    other, _ = quantize(tmp_path, model, seed=1)
    assert digest(first) == digest(second)
    assert digest(first)["model.safetensors"] != digest(other)["model.safetensors"]


def test_config_files_hold_the_fields_that_readers_need(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    output, result = quantize(tmp_path, model, preset="balanced")
    before, after = (json.loads((path / "config.json").read_text()) for path in (model, output))
    settings = after.pop("quantization_config")
    assert after == before
    assert settings == {
        "quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True,
        "checkpoint_format": "gptq", "format": "gptq", "lm_head": False, "true_sequential": True,
        "static_groups": True, "act_group_aware": True, "damp_percent": 0.05, "pack_dtype": "int32",
    }  # fmt: skip
    legacy = json.loads((output / "quantize_config.json").read_text())
    meta = legacy.pop("meta")
    assert legacy == settings
    assert meta["quantizer"][0].startswith("gptq_cli:")
    assert meta["calibration_sha256"] == result.calibration_sha256


def test_other_files_are_copied_exactly_with_usual_modes(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "tool.jinja").write_bytes(b"{{ x }}\r\n\xc3\xa9")
    output, _ = quantize(tmp_path, model)
    for name in ("tokenizer.json", "tokenizer_config.json", "additional_chat_templates/tool.jinja"):
        assert (output / name).read_bytes() == (model / name).read_bytes()
    usual = tmp_path / "usual"
    usual.touch()
    modes = {path.stat().st_mode for path in output.rglob("*") if path.is_file()}
    assert modes == {usual.stat().st_mode}


def test_each_shard_holds_whole_layers_as_the_index_lists(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", max_shard_size="200KB")
    whole, _ = quantize(tmp_path, model)
    output, result = quantize(tmp_path, model, max_shard_size="60KB")
    index = json.loads((output / "model.safetensors.index.json").read_text())
    checkpoint = open_checkpoint(output)
    assert len(set(index["weight_map"].values())) > 3
    assert index["metadata"]["total_size"] == sum(
        tensor.nbytes for tensor in checkpoint.tensors.values()
    )
    for layer in result.layers:
        assert len({index["weight_map"][f"{layer.name}.{part}"] for part in PARTS}) == 1
    a, b = TensorReader(open_checkpoint(whole)), TensorReader(checkpoint)
    assert all(torch.equal(a.read(name), b.read(name)) for name in b.names())
    assert set(a.names()) == set(b.names())
    for file in set(index["weight_map"].values()):
        # The library itself accepts our files.
        with safe_open(output / file, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}


@pytest.mark.parametrize(
    "changes", [{}, {"bits": 3, "sym": False, "max_shard_size": "60KB"}, {"group_size": -1}]
)
def test_the_plan_predicts_the_output_size_to_the_byte(
    changes: dict[str, object], tmp_path: Path
) -> None:
    model = save_model(tmp_path / "model")
    plan = plan_run(model, config(**changes))
    output, result = quantize(tmp_path, model, **changes)
    real = sum(file.stat().st_size for file in output.glob("*.safetensors"))
    assert plan.layout.nbytes == result.bytes_after == real
    assert plan.bits_per_weight == result.bits_per_weight


@pytest.mark.parametrize("desc_act", [False, True])
def test_g_idx_is_trivial_unless_desc_act_is_set(desc_act: bool, tmp_path: Path) -> None:
    output, _ = quantize(tmp_path, save_model(tmp_path / "model"), desc_act=desc_act)
    linears = [reader(output).linear(f"model.layers.1.self_attn.{name}_proj") for name in "qkv"]
    groups = [linear.group_of_column for linear in linears]
    assert all(torch.equal(groups[0], other) for other in groups[1:])
    assert groups[0].bincount().tolist() == [32, 32]
    assert torch.equal(groups[0], torch.arange(64) // 32) is not desc_act
    assert described(output)["desc_act"] is desc_act


def test_act_order_with_static_groups_gives_a_plain_checkpoint(
    tmp_path: Path,
) -> None:
    model = save_model(tmp_path / "model")
    output, _ = quantize(tmp_path, model, desc_act=True, static_groups=True)
    assert described(output)["desc_act"] is False
    linear = reader(output).linear("model.layers.0.mlp.down_proj")
    assert torch.equal(linear.group_of_column, torch.arange(128, dtype=torch.int32) // 32)


@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_stored_zero_points_are_never_zero(bits: int, sym: bool, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", num_hidden_layers=1)
    for format in ("gptq", "gptq_v2"):
        output, result = quantize(tmp_path, model, bits=bits, sym=sym, format=format)
        for layer in result.layers:
            zeros = reader(output).linear(layer.name).zeros
            assert zeros.min() >= 1
            assert zeros.max() <= 2**bits - 1
            assert not sym or set(zeros.flatten().tolist()) == {2 ** (bits - 1)}


def test_both_formats_hold_the_same_weights(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    first, result = quantize(tmp_path, model, sym=False, format="gptq")
    second, _ = quantize(tmp_path, model, sym=False)
    assert described(second)["checkpoint_format"] == "gptq_v2"
    for layer in result.layers:
        weight = f"{layer.name}.weight"
        assert torch.equal(reader(first).read(weight), reader(second).read(weight))


def test_rules_keep_and_change_layers_in_both_dialects(tmp_path: Path) -> None:
    rules = {
        r"-:.*layers\.1\.self_attn\.(q|k|v)_proj": {},
        r"+:.*down_proj": {"bits": 8, "group_size": 64},
    }
    model = save_model(tmp_path / "model")
    output, result = quantize(tmp_path, model, dynamic=rules)
    kept = {f"model.layers.1.self_attn.{name}_proj" for name in "qkv"}
    assert set(result.kept) == kept
    assert {layer.bits for layer in result.layers if layer.name.endswith("down_proj")} == {8}
    assert {layer.bits for layer in result.layers if not layer.name.endswith("down_proj")} == {4}
    settings = described(output)
    (listed,) = settings["modules_in_block_to_quantize"]
    assert set(listed) == {layer.name for layer in result.layers}
    skips = [rule.removeprefix("-:") for rule in settings["dynamic"] if rule.startswith("-:")]

    def skipped(name: str) -> bool:
        return any(re.match(skip, name) for skip in skips)

    matched = {name for name in open_checkpoint(model).tensors if skipped(name[:-7])}
    assert matched == {f"{name}.weight" for name in kept}
    assert skipped("model.layers.1.self_attn.qkv_proj")  # the name of the fused linear
    assert settings["dynamic"][r"+:.*down_proj"] == {"bits": 8, "group_size": 64}


def test_one_layer_with_its_own_order_makes_desc_act_true(tmp_path: Path) -> None:
    rules = {r"+:.*layers\.1\.mlp\.down_proj": {"desc_act": True}}
    output, _ = quantize(tmp_path, save_model(tmp_path / "model"), dynamic=rules)
    settings = described(output)
    assert settings["desc_act"] is True
    assert (settings["act_group_aware"], settings["static_groups"]) == (False, False)
    groups = reader(output).linear("model.layers.1.mlp.down_proj").group_of_column
    assert not torch.equal(groups, torch.arange(128, dtype=torch.int32) // 32)


def test_a_head_kept_by_a_rule_is_not_declared_quantized(tmp_path: Path) -> None:
    output, result = quantize(
        tmp_path, save_model(tmp_path / "model"), lm_head=True, dynamic={"-:lm_head": {}}
    )
    assert result.kept == ("lm_head",)
    assert described(output)["lm_head"] is False
    assert "lm_head.weight" in open_checkpoint(output).tensors


def test_only_listed_modules_are_quantized(tmp_path: Path) -> None:
    listed = [["self_attn.o_proj"], ["mlp.down_proj"]]
    _, result = quantize(
        tmp_path, save_model(tmp_path / "model"), modules_in_block_to_quantize=listed
    )
    assert {layer.name.rpartition(".")[2] for layer in result.layers} == {"o_proj", "down_proj"}
    assert len(result.kept) == 15


@pytest.mark.parametrize("tied", [False, True])
def test_lm_head_quantizes_and_unties_the_head(tied: bool, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", tie_word_embeddings=tied)
    output, result = quantize(tmp_path, model, lm_head=True, bits=8)
    assert result.layers[-1].name == "lm_head"
    assert result.layers[-1].relative_error < 1e-3
    assert json.loads((output / "config.json").read_text())["tie_word_embeddings"] is False
    assert described(output)["lm_head"] is True
    tensors = open_checkpoint(output).tensors
    assert "lm_head.weight" not in tensors
    assert "model.embed_tokens.weight" in tensors
    source = "model.embed_tokens.weight" if tied else "lm_head.weight"
    original = TensorReader(open_checkpoint(model)).read(source)
    assert (reader(output).read("lm_head.weight") - original).abs().max() < 0.02


def test_events_report_the_run_and_the_result_is_plain_json(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    result, events = quantize_with_events(model, tmp_path / "out")
    assert [event.index for event in events if isinstance(event, BlockFinished)] == [0, 1, 2]
    assert [event.n_quantized for event in events if isinstance(event, RunPlanned)] == [21]
    assert len([event for event in events if isinstance(event, LayerSolved)]) == 21
    content = json.loads(json.dumps(result.to_json()))
    assert content["tokens"] == 6 * 64
    for layer in content["layers"]:
        assert layer["tokens"] == 6 * 64
        assert 0 < layer["relative_error"] < layer["rtn_relative_error"] < 0.1
    assert content["config"]["seqlen"] == 64


def test_the_resolved_config_beside_the_weights_repeats_the_run(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    first, _ = quantize(tmp_path, model, sym=False, desc_act=True, bits=3)
    again = QuantizeConfig(**yaml.safe_load((first / "gptq_config.yaml").read_text()))
    quantize_checkpoint(str(model), tmp_path / "again", again)
    assert digest(first) == digest(tmp_path / "again")


def test_a_dead_input_is_reported_and_its_weights_become_zero(
    tmp_path: Path,
) -> None:
    model = save_model(tmp_path / "model")
    checkpoint = open_checkpoint(model)
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.input_layernorm.weight"][5] = 0
    save_file(tensors, checkpoint.tensors["lm_head.weight"].file, metadata={"format": "pt"})
    output = tmp_path / "out"
    result, events = quantize_with_events(model, output)
    dead = {layer.name.rpartition(".")[2] for layer in result.layers if layer.dead_columns}
    assert dead == {"q_proj", "k_proj", "v_proj"}
    warnings = [event for event in events if isinstance(event, Warned)]
    assert [event.code for event in warnings] == ["W_NUM_DEAD"] * 3
    assert (
        "`model.layers.1.self_attn.q_proj`: 1 of 64 inputs were always zero" in warnings[0].message
    )
    assert not reader(output).read("model.layers.1.self_attn.q_proj.weight")[:, 5].any()


def test_infinite_activations_stop_the_run_and_name_the_layer(
    tmp_path: Path,
) -> None:
    model = save_model(tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.post_attention_layernorm.weight"][3] = 1e30
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        GateError, match=r"model\.layers\.1\.mlp\.gate_proj.*NaN or infinity"
    ) as caught:
        quantize(tmp_path, model)
    assert caught.value.code == "E_NUM_ACT"
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [".out-1.gptq-work", "model"]  # a block is finished


def test_nonfinite_weights_are_refused_by_name(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    name = "model.layers.2.mlp.up_proj.weight"
    events: list[Event] = []
    with pytest.raises(InputError) as caught:
        quantize_checkpoint(str(model), tmp_path / "out", config(), report=events.append)
    assert (caught.value.code, caught.value.exit_code) == ("E_CKPT_NONFINITE", 3)
    assert str(caught.value) == f"`{name}` in model.safetensors holds NaN or infinity, 1 times"
    assert not [event for event in events if isinstance(event, BlockStarted)]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_fields_unknown_to_readers_stay_out_of_their_config(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    rules = {
        r"+:.*down_proj": {"bits": 8, "scale_search": "mse", "damp_mode": "mean"},
        r"+:.*o_proj": {"sym": False},
    }
    output, result = quantize(
        tmp_path, model, preset="balanced", refine_sweeps=1, dynamic=rules, format="gptq"
    )
    plain, _ = quantize(tmp_path, model, static_groups=True, damp_percent=0.05, format="gptq")
    known_rules = {r"+:.*down_proj": {"bits": 8}, r"+:.*o_proj": {"sym": False}}
    assert described(output) == described(plain) | {"dynamic": known_rules}
    written = QuantizeConfig(**yaml.safe_load((output / "gptq_config.yaml").read_text()))
    assert written == result.config
    assert written.for_layer("model.layers.0.mlp.down_proj").scale_search == "mse"
    assert result.to_json()["config"]["signed_scales"] is True


def test_signed_scales_are_stored_and_read_back_with_both_signs(
    tmp_path: Path,
) -> None:
    model = save_model(tmp_path / "model")
    output, result = quantize(tmp_path, model, preset="balanced", bits=3)
    plain, unsigned = quantize(tmp_path, model, preset="act-order", bits=3)
    for layer, other in zip(result.layers, unsigned.layers, strict=True):
        linear = reader(output).linear(layer.name)
        assert (linear.scales > 0).any()
        assert (linear.scales < 0).any()
        assert torch.equal(linear.scales.bfloat16().half(), linear.scales)
        assert (reader(plain).linear(layer.name).scales > 0).all()
        assert layer.relative_error < other.relative_error
        damping = min(1, 4 * linear.codes.shape[1] / layer.tokens)
        assert layer.damp_percent == pytest.approx(damping)
        name = f"{layer.name}.weight"
        weight = TensorReader(open_checkpoint(model)).read(name).float()
        assert (reader(output).read(name) - weight).norm() < 0.3 * weight.norm()
