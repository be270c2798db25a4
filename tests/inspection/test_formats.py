"""Each format converts into each other one without a change of a weight, or is refused."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from gptq_cli.checkpoint.defects import Defect
from gptq_cli.checkpoint.source import open_checkpoint
from gptq_cli.checkpoint.verify import verify_checkpoint
from gptq_cli.cli.app import app
from gptq_cli.config.layer import FORMATS, GPTQ_FORMATS
from gptq_cli.errors import ConfigError, InputError
from gptq_cli.inspection.compare import compare_checkpoints
from gptq_cli.inspection.convert import convert_checkpoint
from gptq_cli.inspection.summary import inspect_checkpoint
from gptq_cli.planning.plan import plan_run
from tests.conformance.written import LINEARS, Written, write, write_mixture
from tests.disks import CountingDisk, DyingDisk, Killed, using
from tests.families import save_drafted, save_model
from tests.runs import config, digest, quantize, reader

# Bits and groups by rule, a whole row, kept linears, and a quantized head
RULES: dict[str, Any] = {
    r"-:.*v_proj": {},
    r"+:.*\.1\.mlp": {"bits": 8, "group_size": -1},
    r"+:.*k_proj": {"bits": 2},
    r"+:.*o_proj": {"bits": 3, "group_size": 64},
}
MIXED = {"bits": 4, "group_size": 32, "lm_head": True, "dynamic": RULES}
NEW = ["compressed-tensors", "mlx", "auto-round"]
PAIRS = [(first, second) for first in FORMATS for second in FORMATS if first != second]


def defects(directory: Path) -> tuple[Defect, ...]:
    return verify_checkpoint(directory, full=True).defects


def settings_of(directory: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((directory / "config.json").read_text())
    return content.get("quantization") or content["quantization_config"]


def change(directory: Path, name: str, tensor: torch.Tensor | None) -> None:
    """Replace a tensor of the checkpoint, or remove it."""
    tensors = load_file(directory / "model.safetensors")
    del tensors[name]
    if tensor is not None:
        tensors[name] = tensor
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def single(folder: Path, **settings: Any) -> Written:
    """Write a checkpoint in one file, which has no manifest."""
    return write(folder, **{"max_shard_size": "1GB", "bits": 4, "group_size": 32, **settings})


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_a_conversion_keeps_every_weight(first: str, second: str, tmp_path: Path) -> None:
    sym = PAIRS.index((first, second)) % 2 == 0  # others are in tests/checkpoint/test_formats.py
    source = write(tmp_path, **(MIXED | {"format": first, "sym": sym}))
    found = convert_checkpoint(str(source.output), tmp_path / "there", second)
    assert found.layers == len(source.weights) == 13
    assert defects(tmp_path / "there") == ()
    weights = reader(tmp_path / "there")
    for name, weight in source.weights.items():
        assert (weights.read(f"{name}.weight").double().numpy() == weight).all(), name
    kept = "model.layers.1.self_attn.v_proj.weight"
    assert torch.equal(weights.read(kept), reader(source.output).read(kept))
    assert (tmp_path / "there" / "quantize_config.json").exists() == (second not in NEW)


@pytest.mark.parametrize("format", NEW)
def test_converting_there_and_back_restores_all_tensors(format: str, tmp_path: Path) -> None:
    settings = MIXED | {"dynamic": {r"-:.*v_proj": {}, r"+:.*k_proj": {"bits": 2}}}
    source = write(tmp_path, **settings).output
    convert_checkpoint(str(source), tmp_path / "there", format)
    convert_checkpoint(str(tmp_path / "there"), tmp_path / "back", "gptq")
    for file in source.glob("*.safetensors"):
        before, after = load_file(file), load_file(tmp_path / "back" / "model.safetensors")
        assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("format", NEW)
def test_a_run_writes_what_a_conversion_of_it_writes(format: str, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", num_hidden_layers=2)
    settings = {"lm_head": True, "dynamic": {r".*q_proj": {"bits": 3}, r"-:.*v_proj": {}}}
    usual, _ = quantize(tmp_path, model, **settings)
    direct, result = quantize(tmp_path, model, format=format, **settings)
    convert_checkpoint(str(usual), tmp_path / "converted", format)
    ours, theirs = digest(direct), digest(tmp_path / "converted")
    assert ours.pop("gptq_manifest.json") != theirs.pop("gptq_manifest.json")
    del ours["config.json"], theirs["config.json"]  # whose keys may have another order
    assert ours == theirs
    assert settings_of(direct) == settings_of(tmp_path / "converted")
    assert result.bytes_after == (direct / "model.safetensors").stat().st_size
    assert defects(direct) == ()


@pytest.mark.parametrize("format", NEW)
def test_the_origin_of_a_checkpoint_outlives_a_conversion(format: str, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", num_hidden_layers=1)
    usual, _ = quantize(tmp_path, model)
    direct, _ = quantize(tmp_path, model, format=format)
    convert_checkpoint(str(usual), tmp_path / "there", format)
    convert_checkpoint(str(tmp_path / "there"), tmp_path / "back", "gptq")
    known = inspect_checkpoint(open_checkpoint(usual)).provenance
    assert {"quantizer", "calibration_sha256", "dataset"} <= set(known)
    manifest = json.loads((usual / "gptq_manifest.json").read_text())
    for other in (direct, tmp_path / "there", tmp_path / "back"):
        assert inspect_checkpoint(open_checkpoint(other)).provenance == known
        found = json.loads((other / "gptq_manifest.json").read_text())
        assert found["origin"] == manifest["origin"]
        assert ("meta" in found) == (other.name != "back")


@pytest.mark.parametrize("format", NEW)
def test_a_new_format_is_read_by_all_commands(format: str, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", "qwen3", num_hidden_layers=1)
    output, _ = quantize(tmp_path, model, format=format, bits=6, sym=False)
    found = inspect_checkpoint(open_checkpoint(output))
    assert (found.method, found.format, found.sym) == (format, format, False)
    assert {(module.bits, module.group_size) for module in found.modules} == {(6, 32)}
    plain = compare_checkpoints(str(output), str(model))
    assert (plain.only_a, plain.only_b) == ((), ())
    assert max(tensor.relative_error for tensor in plain.tensors) < 0.002
    again, _ = quantize(tmp_path, output, bits=8, allow_requantize=True)
    assert compare_checkpoints(str(again), str(output)).tensors[-1].relative_error < 1e-4
    (tmp_path / "text.txt").write_text("a quick brown fox jumps over the lazy dog " * 20)
    words = ["eval-ppl", str(output), "--dataset", str(tmp_path / "text.txt"), "--seqlen", "32"]
    evaluated = CliRunner().invoke(app, [*words, "--baseline", str(model), "--json"])
    assert evaluated.exit_code == 0, evaluated.stderr


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("format", FORMATS)
def test_the_plan_is_exact_to_the_byte(format: str, sym: bool, tmp_path: Path) -> None:
    written = single(tmp_path, format=format, sym=sym, dynamic=RULES, lm_head=True)
    assert written.plan.layout.nbytes == (written.output / "model.safetensors").stat().st_size
    config = written.config
    assert plan_run(written.source, config).layout.nbytes == written.plan.layout.nbytes


MISFITS = {
    "5 bits": ({"bits": 5, "format": "mlx"}, "gptq", "gptq stores 2, 3, 4 or 8 bits"),
    "7 bits": ({"bits": 7, "format": "auto-round"}, "mlx", "mlx stores 2, 3, 4, 5, 6 or 8 bits"),
    "groups of 16": ({"group_size": 16}, "mlx", "mlx stores groups of a multiple of 32 columns"),
    "g_idx": (
        {"desc_act": True},
        "compressed-tensors",
        "compressed-tensors stores no g_idx, the group of each column",
    ),
}
WAYS_OUT = {
    "5 bits": "--to compressed-tensors, mlx or auto-round",
    "7 bits": "--to compressed-tensors or auto-round",
    "groups of 16": "--to gptq, gptq_v2, compressed-tensors or auto-round",
    "g_idx": "--to gptq or gptq_v2",
}


@pytest.mark.parametrize("case", MISFITS)
def test_a_format_refuses_what_it_cannot_store(case: str, tmp_path: Path) -> None:
    settings, to, reason = MISFITS[case]
    source = single(tmp_path, **settings)
    with pytest.raises(ConfigError) as caught:
        convert_checkpoint(str(source.output), tmp_path / "there", to)
    assert (caught.value.code, caught.value.exit_code) == ("E_CFG_FORMAT", 2)
    first = "model.layers.0.mlp.down_proj"
    assert str(caught.value) == f"{reason}, but `{first}` and 13 more needs more"
    assert caught.value.hint == f"what stores all layers: {WAYS_OUT[case]}"
    assert not (tmp_path / "there").exists()


def test_g_idx_of_whole_rows_is_in_order(tmp_path: Path) -> None:
    source = single(tmp_path, desc_act=True, group_size=-1)
    convert_checkpoint(str(source.output), tmp_path / "there", "compressed-tensors")
    assert defects(tmp_path / "there") == ()


@pytest.mark.parametrize("format", NEW)
def test_experts_convert_with_their_router_kept(format: str, tmp_path: Path) -> None:
    source = write_mixture(tmp_path, bits=4, group_size=32)
    convert_checkpoint(str(source.output), tmp_path / "there", format)
    assert defects(tmp_path / "there") == ()
    weights = reader(tmp_path / "there")
    for name, weight in source.weights.items():
        assert (weights.read(f"{name}.weight").double().numpy() == weight).all(), name
    tensors = load_file(tmp_path / "there" / "model.safetensors")
    stacked = [name for name in tensors if "switch_mlp" in name]
    assert len(stacked) == (18 if format == "mlx" else 0)  # 2 blocks, 3 linears, 3 parts
    assert all(tensors[name].shape[0] == 3 for name in stacked)


def test_all_experts_of_a_layer_share_one_pattern(tmp_path: Path) -> None:
    rules = {r"+:.*self_attn": {"bits": 8}, r"-:.*1\.mlp\.experts": {}}
    experts = {f"mlp.experts.{expert}.up_proj": (32, 64) for expert in range(12)}
    source = write(tmp_path, LINEARS | experts, bits=4, group_size=32, dynamic=rules)
    convert_checkpoint(str(source.output), tmp_path / "there", "compressed-tensors")
    assert defects(tmp_path / "there") == ()
    found = settings_of(tmp_path / "there")
    assert found["config_groups"]["group_0"]["targets"] == ["Linear"]
    assert found["ignore"] == [
        "lm_head", "model.embed_tokens", r"re:.*\.layers\.1\.mlp\.experts[.].*",
    ]  # fmt: skip


@pytest.mark.parametrize("group_size", [16, 32])
def test_kept_experts_of_a_drafting_block_spare_a_blocks(group_size: int, tmp_path: Path) -> None:
    """mtp.layers.0 and model.language_model.layers.0 differ in their first parts alone."""
    model = save_drafted(tmp_path / "model", "qwen3_5_moe")
    written = {"format": "compressed-tensors", "group_size": group_size, "unfit": "keep"}
    output, _ = quantize(tmp_path, model, **written)
    assert defects(output) == ()
    pattern = r"re:.*mtp\.layers\.0\.mlp\.experts[.].*"
    assert pattern in settings_of(output)["ignore"]
    ours = "model.language_model.layers.0.mlp.experts.0.up_proj"
    assert f"{ours}.weight_packed" in open_checkpoint(output).tensors
    assert re.fullmatch(pattern.removeprefix("re:"), ours) is None


def test_mlx_refuses_experts_with_different_settings(tmp_path: Path) -> None:
    rules = {r"+:.*experts\.1\.up_proj": {"bits": 8}}
    source = write(tmp_path, LINEARS | {f"mlp.experts.{e}.up_proj": (32, 64) for e in range(2)},
                   bits=4, group_size=32, dynamic=rules)  # fmt: skip
    with pytest.raises(ConfigError, match="would hold all experts, but they differ") as caught:
        convert_checkpoint(str(source.output), tmp_path / "there", "mlx")
    assert (caught.value.code, caught.value.exit_code) == ("E_CFG_FORMAT", 2)
    assert "the same settings" in (caught.value.hint or "")


NAME = "model.layers.1.mlp.up_proj"


def test_biases_that_no_zero_point_explains_are_a_defect(tmp_path: Path) -> None:
    output = single(tmp_path, format="mlx", sym=False).output
    biases = load_file(output / "model.safetensors")[f"{NAME}.biases"]
    biases[3, 1] *= 1.01
    change(output, f"{NAME}.biases", biases)
    (found,) = defects(output)
    assert (found.code, found.tensor) == ("E_CKPT_ZEROS", NAME)
    assert found.message == "1 of 256 zero points are no whole number from 0 to 15"
    with pytest.raises(InputError) as caught:
        convert_checkpoint(str(output), tmp_path / "there", "gptq_v2")
    assert (caught.value.code, caught.value.exit_code) == ("E_CKPT_ZEROS", 3)
    assert "only readers of mlx decode such grids" in (caught.value.hint or "")


def test_a_symmetric_grid_of_mlx_has_its_zero_in_the_middle(tmp_path: Path) -> None:
    output = single(tmp_path, format="mlx").output
    tensors = load_file(output / "model.safetensors")
    scales = torch.full_like(tensors[f"{NAME}.scales"], 0.5)
    change(output, f"{NAME}.scales", scales)
    change(output, f"{NAME}.biases", scales * -7)
    (found,) = defects(output)
    assert (found.code, found.tensor) == ("E_CKPT_ZEROS", NAME)
    assert found.message == "256 of 256 zero points are not 8, but sym is true"


PARTS = {
    "compressed-tensors": ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point"),
    "mlx": ("scales", "biases"),
    "auto-round": ("qweight", "qzeros", "scales"),
}


@pytest.mark.parametrize("format", NEW)
def test_each_missing_part_is_a_defect(format: str, tmp_path: Path) -> None:
    output = single(tmp_path, format=format, sym=False).output
    whole = load_file(output / "model.safetensors")
    for part in PARTS[format]:
        change(output, f"{NAME}.{part}", None)
        assert [(found.code, found.message, found.tensor) for found in defects(output)] == [
            ("E_CKPT_INCOMPLETE", f"no {part}", NAME)
        ]
        save_file(whole, output / "model.safetensors", metadata={"format": "pt"})


def without(output: Path, *names: str) -> None:
    """Remove every tensor of the named modules, but no bias."""
    tensors = load_file(output / "model.safetensors")
    for name in list(tensors):
        module, _, part = name.rpartition(".")
        if module in names and part != "bias":
            del tensors[name]
    save_file(tensors, output / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("format", FORMATS)
def test_a_linear_that_one_block_lacks_is_a_defect(format: str, tmp_path: Path) -> None:
    output = single(tmp_path, format=format, blocks=3, dynamic={r"-:.*\.2\.mlp": {}}).output
    assert defects(output) == ()
    without(output, "model.layers.1.self_attn.q_proj")
    *others, found = defects(output)
    assert len(others) == (format in GPTQ_FORMATS)  # which list the quantized linears
    assert (found.code, found.tensor) == ("E_CKPT_INCOMPLETE", "model.layers.1.self_attn.q_proj")
    assert found.message == "has no tensor, but the same blocks elsewhere have this part"
    with pytest.raises(InputError, match=r"1\.self_attn\.q_proj: has no tensor") as caught:
        convert_checkpoint(str(output), tmp_path / "there", "gptq_v2")
    assert (caught.value.code, caught.value.exit_code) == ("E_CKPT_INCOMPLETE", 3)
    assert "download the checkpoint again" in (caught.value.hint or "")


@pytest.mark.parametrize("case", ["two blocks", "another type", "another norm", "few blocks"])
def test_blocks_of_a_hybrid_model_may_differ(case: str, tmp_path: Path) -> None:
    blocks = {"few blocks": 2, "two blocks": 4}.get(case, 3)
    output = single(tmp_path, blocks=blocks).output
    without(output, NAME)
    if case == "two blocks":
        without(output, "model.layers.2.mlp.up_proj")
    elif case == "another type":
        content = json.loads((output / "config.json").read_text())
        content["layer_types"] = ["full", "linear", "full"]
        (output / "config.json").write_text(json.dumps(content))
    elif case == "another norm":
        change(output, "model.layers.1.input_layernorm.weight", torch.ones(32).half())
    assert defects(output) == ()


def test_words_of_older_versions_and_other_shapes_are_defects(tmp_path: Path) -> None:
    output = single(tmp_path, format="compressed-tensors", bits=3).output
    change(output, f"{NAME}.weight_shape", torch.tensor([128, 96]))
    assert [found.code for found in defects(output)] == ["E_CKPT_SHAPE"]
    change(output, f"{NAME}.weight_shape", torch.tensor([128, 64]))
    # Ten numbers of three bits a word, as before version 0.18
    change(output, f"{NAME}.weight_packed", torch.ones(128, 7, dtype=torch.int32))
    assert {found.code for found in defects(output)} == {"E_CKPT_SHAPE"}


BROKEN: dict[str, dict[str, dict[str, Any]]] = {
    "compressed-tensors": {
        "num_bits is 9": {"config_groups": {"g": {"weights": {"num_bits": 9, "strategy": "channel"},
                                                  "targets": [], "format": "pack-quantized"}}},
        "config_groups is missing or empty": {"config_groups": {}},
        "ignore is not a list": {"ignore": "lm_head"},
        "'re:(' is not a regular": {"ignore": ["re:("]},
    },
    "mlx": {
        "bits is 7": {"bits": 7},
        "group_size is 48": {"group_size": 48},
        "bits is '4'": {"bits": "4", "": {"bits": 4}},
    },
    "auto-round": {
        "bits is 9": {"bits": 9},
        "group_size is '32'": {"group_size": "32"},
        "sym is 1": {"sym": 1},
        "extra_config is not a mapping": {"extra_config": [1]},
        "'*bad' is not a regular": {"extra_config": {"*bad": {"bits": 4}}},
        "'(a' is not a regular": {"extra_config": {"(a": {"bits": 4}}},
    },
}  # fmt: skip


@pytest.mark.parametrize("format", NEW)
def test_unusable_settings_of_a_format_are_defects(format: str, tmp_path: Path) -> None:
    output = single(tmp_path, format=format).output
    content = json.loads((output / "config.json").read_text())
    key = "quantization" if format == "mlx" else "quantization_config"
    for message, changed in BROKEN[format].items():
        (output / "config.json").write_text(json.dumps(content | {key: content[key] | changed}))
        (found,) = defects(output)
        assert (found.code, found.place, found.effect) == (
            "E_CKPT_CONFIG",
            "config.json",
            "numbers",
        )
        assert message in found.message


FLOATS = {"config_groups": {"g": {"format": "float-quantized", "weights": {}}}}
UNREADABLE: list[tuple[str, dict[str, Any], str]] = [
    ("compressed-tensors", FLOATS, "float-"),
    ("compressed-tensors", {"transform_config": {"config_groups": {"u": {}}}}, "with transform_"),
    ("compressed-tensors", {"kv_cache_scheme": {"num_bits": 8}}, "with kv_cache_scheme"),
    ("compressed-tensors", {"sparsity_config": {"format": "sparse-24"}}, "with sparsity_config"),
    ("mlx", {"mode": "mxfp4"}, "mode mxfp4"),
    ("auto-round", {"packing_format": "auto_round:auto_awq"}, "auto_round:auto_awq"),
    ("auto-round", {"packing_format": []}, r"\[\]"),
]


@pytest.mark.parametrize(("format", "changed", "words"), UNREADABLE)
def test_other_forms_of_a_method_are_refused(
    format: str, changed: dict[str, Any], words: str, tmp_path: Path
) -> None:
    output = single(tmp_path, format=format).output
    content = json.loads((output / "config.json").read_text())
    key = "quantization" if format == "mlx" else "quantization_config"
    (output / "config.json").write_text(json.dumps(content | {key: content[key] | changed}))
    with pytest.raises(InputError, match=f"is quantized as {format} \\({words}") as caught:
        convert_checkpoint(str(output), tmp_path / "there", "gptq")
    assert (caught.value.code, caught.value.exit_code) == ("E_CKPT_QUANTIZED", 3)
    assert "full-precision" in (caught.value.hint or "")
    assert inspect_checkpoint(open_checkpoint(output)).format is None


def test_unused_settings_beside_the_groups_are_read(tmp_path: Path) -> None:
    output = single(tmp_path, format="compressed-tensors").output
    content = json.loads((output / "config.json").read_text())
    unused = {"transform_config": {}, "kv_cache_scheme": None, "sparsity_config": {}}
    for sparsity in ({}, {"format": "dense"}):
        content["quantization_config"] |= unused | {"sparsity_config": sparsity}
        (output / "config.json").write_text(json.dumps(content))
        assert defects(output) == ()


@pytest.mark.parametrize("to", ["gptq", "gptq_v2"])
def test_a_g_idx_of_compressed_tensors_makes_desc_act_true(to: str, tmp_path: Path) -> None:
    output = single(tmp_path, format="compressed-tensors").output
    content = json.loads((output / "config.json").read_text())
    content["quantization_config"]["config_groups"]["group_0"]["weights"]["actorder"] = "group"
    (output / "config.json").write_text(json.dumps(content))
    tensors = load_file(output / "model.safetensors")
    g_idx = torch.arange(64, dtype=torch.int32) % 2
    tensors[f"{NAME}.weight_g_idx"] = g_idx
    save_file(tensors, output / "model.safetensors", metadata={"format": "pt"})
    convert_checkpoint(str(output), tmp_path / "there", to)
    assert settings_of(tmp_path / "there")["desc_act"] is True
    assert defects(tmp_path / "there") == ()
    name = f"{NAME}.weight"
    assert torch.equal(reader(tmp_path / "there").read(name), reader(output).read(name))


UP = "model.layers.1.mlp.switch_mlp.up_proj"
EXPERT = "model.layers.1.mlp.experts.0.up_proj"
STACKS: dict[str, tuple[str, str]] = {
    "fewer": ("E_CKPT_INCOMPLETE", "holds 2 experts, but `"),
    "none": ("E_CKPT_SHAPE", "has shape [0, 32, "),
    "flat": ("E_CKPT_SHAPE", "has shape [96, "),
    "twice": ("E_CKPT_RULES", f"also holds `{EXPERT}."),
}


@pytest.mark.parametrize("case", STACKS)
def test_experts_that_a_stack_lacks_or_doubles_are_refused(case: str, tmp_path: Path) -> None:
    output = write_mixture(
        tmp_path, bits=4, group_size=32, format="mlx", max_shard_size="1GB"
    ).output
    tensors = load_file(output / "model.safetensors")
    for part in ("weight", "scales", "biases"):
        name = f"{UP}.{part}"
        stack = tensors[name]
        if case == "twice":
            tensors[f"{EXPERT}.{part}"] = stack[0].clone()
            continue
        changed = {"fewer": stack[:2], "none": stack[:0], "flat": stack.flatten(0, 1)}
        tensors[name] = changed[case].clone()
    save_file(tensors, output / "model.safetensors", metadata={"format": "pt"})
    code, words = STACKS[case]
    (found,) = defects(output)
    assert (found.code, UP in found.message, words in found.message) == (code, True, True)
    with pytest.raises(InputError) as caught:
        convert_checkpoint(str(output), tmp_path / "there", "gptq")
    assert (caught.value.code, caught.value.exit_code) == (code, 3)
    assert "download the checkpoint again" in (caught.value.hint or "")


def test_stacks_that_are_cut_alike_have_too_few_experts(tmp_path: Path) -> None:
    output = write_mixture(
        tmp_path, bits=4, group_size=32, format="mlx", max_shard_size="1GB"
    ).output
    tensors = load_file(output / "model.safetensors")
    for name, tensor in tensors.items():
        if "layers.1.mlp.switch_mlp" in name:
            tensors[name] = tensor[:2].clone()
    save_file(tensors, output / "model.safetensors", metadata={"format": "pt"})
    (found,) = defects(output)
    assert (found.code, found.tensor) == ("E_CKPT_INCOMPLETE", "model.layers.1.mlp.experts")
    router = "model.layers.1.mlp.gate.weight"
    assert found.message == f"there are 2 experts, but `{router}` chooses among 3"


def test_compressed_tensors_settings_are_those_of_its_library(tmp_path: Path) -> None:
    rules = {r"+:.*k_proj": {"bits": 5, "group_size": -1}, r"-:.*v_proj": {}}
    output = single(tmp_path, format="compressed-tensors", dynamic=rules, lm_head=True).output
    found = settings_of(output)
    usual, other = found["config_groups"].values()
    assert (found["quant_method"], found["format"]) == ("compressed-tensors", "pack-quantized")
    assert found["quantization_status"] == "compressed"
    assert usual["targets"] == ["Linear", "lm_head"]
    common = {"type": "int", "symmetric": True, "dynamic": False}
    assert usual["weights"] == common | {"num_bits": 4, "strategy": "group", "group_size": 32}
    assert other["targets"] == [f"model.layers.{block}.self_attn.k_proj" for block in range(2)]
    assert other["weights"] == common | {"num_bits": 5, "strategy": "channel"}
    kept = [f"model.layers.{block}.self_attn.v_proj" for block in range(2)]
    assert found["ignore"] == ["model.embed_tokens", *kept]


def test_mlx_settings_name_layers_that_differ(tmp_path: Path) -> None:
    output = single(tmp_path, format="mlx", dynamic={r"+:.*down_proj": {"group_size": -1}}).output
    found = settings_of(output)
    names = [f"model.layers.{block}.mlp.down_proj" for block in range(2)]
    rows = {name: {"group_size": 128, "bits": 4} for name in names}
    kept = {"lm_head": False, "model.embed_tokens": False}
    assert found == {"group_size": 32, "bits": 4} | rows | kept
    content = json.loads((output / "config.json").read_text())
    assert content["quantization_config"] == content["quantization"]


def test_auto_round_settings_name_blocks_and_exceptions(tmp_path: Path) -> None:
    rules = {r"+:.*k_proj": {"bits": 5}, r"-:.*v_proj": {}}
    written = single(tmp_path, format="auto-round", dynamic=rules, lm_head=True)
    found = settings_of(written.output)
    assert (found["quant_method"], found["packing_format"]) == (
        "auto-round",
        "auto_round:auto_gptq",
    )
    assert found["block_name_to_quantize"] == "model.layers"
    extra = found["extra_config"]
    assert extra["lm_head"] == {"bits": 4, "group_size": 32, "sym": True}
    assert extra["model.layers.1.self_attn.k_proj"]["bits"] == 5
    assert extra["model.layers.1.self_attn.v_proj"] == {"bits": 16, "data_type": "float"}
    assert len(extra) == 5
    asym = single(tmp_path / "asym", format="auto-round", sym=False).output
    assert settings_of(asym)["packing_format"] == "auto_round"


def test_convert_writes_the_same_output_after_any_kill(tmp_path: Path) -> None:
    source = single(tmp_path).output
    disk = CountingDisk()
    with using(disk):
        convert_checkpoint(str(source), tmp_path / "whole", "mlx")
    whole, output = digest(tmp_path / "whole"), tmp_path / "made"
    for last in range(1, len(disk.operations) + 1, 20):
        with pytest.raises(Killed), using(DyingDisk(last)):
            convert_checkpoint(str(source), output, "mlx")
        if not output.exists():
            convert_checkpoint(str(source), output, "mlx")
        assert digest(output) == whole, f"another output after a kill at operation {last}"
        shutil.rmtree(output)
        shutil.rmtree(tmp_path / ".made.gptq-work", ignore_errors=True)


def test_a_format_that_cannot_store_the_settings_is_refused_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        config(bits=5)
    assert (caught.value.code, caught.value.exit_code) == ("E_CFG_FORMAT", 2)
    assert str(caught.value) == "bits and format do not fit: gptq stores 2, 3, 4 or 8 bits"
    assert caught.value.hint == 'use format="compressed-tensors", "mlx" or "auto-round"'
    with pytest.raises(ConfigError, match="desc_act and format do not fit") as caught:
        config(desc_act=True, format="mlx")
    assert caught.value.hint == "use static_groups=True or act_group_aware=True in its place"
    with pytest.raises(ConfigError, match=r"dynamic\['\+:x'\]\.group_size and format do not fit"):
        config(format="mlx", dynamic={"+:x": {"group_size": 16}})
    assert config(bits=5, format="mlx").bits == 5
