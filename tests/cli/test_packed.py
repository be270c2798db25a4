"""Every command refuses packed weights that would decode wrongly, and its hint works."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import Result

from tests.families import FAMILIES, save_model, texts
from tests.runs import digest, quantize

from .conftest import Run, remove_variables, run_gptq

LAYER = "model.layers.1.mlp.up_proj"
V2_STEP = 0x11111111  # one more in each zero point of 4 bits
Tensors = dict[str, Tensor]
Plant = Callable[[Path], None]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write `model`, the quantized `out` made of it, and a text into one folder."""
    folder = tmp_path_factory.mktemp("packed")
    output, _ = quantize(folder, save_model(folder / "model", num_hidden_layers=2))
    output.rename(folder / "out")
    (folder / "text.txt").write_text(texts()[0], encoding="utf-8")
    return folder


@pytest.fixture
def packed(place: Path, tmp_path: Path) -> Path:
    """Copy `out` as another tool would have published it."""
    return copy_of_another_tool(place, tmp_path / "packed")


def copy_of_another_tool(place: Path, copy: Path) -> Path:
    """Copy `out` of `place` without the files that only this program writes."""
    shutil.copytree(place / "out", copy)
    for name in ("gptq_config.yaml", "gptq_manifest.json"):
        (copy / name).unlink()
    return copy


def change_tensors(directory: Path, change: Callable[[Tensors], object]) -> None:
    file = directory / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def change_settings(directory: Path, **values: object) -> None:
    """Change the settings in both files; a value of None removes its key."""
    for name in ("config.json", "quantize_config.json"):
        content = json.loads((directory / name).read_text())
        settings: dict[str, Any] = content.get("quantization_config", content)
        for key, value in values.items():
            if value is None:
                settings.pop(key, None)
            else:
                settings[key] = value
        (directory / name).write_text(json.dumps(content))


def names_ending(tensors: Tensors, suffix: str) -> list[str]:
    """Return the names of tensors that end with `suffix`."""
    return [name for name in tensors if name.endswith(suffix)]


def zeros_of_v2(directory: Path) -> None:
    def change(tensors: Tensors) -> None:
        for name in names_ending(tensors, ".qzeros"):
            tensors[name] += V2_STEP

    change_tensors(directory, change)


def zero_of_zero(directory: Path) -> None:
    change_tensors(directory, lambda tensors: tensors[f"{LAYER}.qzeros"][0, 0].bitwise_or_(0xF))
    change_settings(directory, sym=False)


def unlike_zero(directory: Path) -> None:
    change_tensors(directory, lambda tensors: tensors[f"{LAYER}.qzeros"][0, 0].sub_(1))


def placeholder(directory: Path) -> None:
    def change(tensors: Tensors) -> None:
        for name in names_ending(tensors, ".g_idx"):
            tensors[name].zero_()

    change_tensors(directory, change)


def empty_g_idx(directory: Path) -> None:
    change_tensors(
        directory,
        lambda tensors: tensors.update({f"{LAYER}.g_idx": torch.zeros(0, dtype=torch.int32)}),
    )


def hidden_order(directory: Path) -> None:
    def change(tensors: Tensors) -> None:
        tensors[f"{LAYER}.g_idx"] = tensors[f"{LAYER}.g_idx"].flip(0).contiguous()

    change_tensors(directory, change)


def lost_order(directory: Path) -> None:
    change_tensors(directory, lambda tensors: tensors.pop(f"{LAYER}.g_idx"))
    change_settings(directory, desc_act=True)


def marlin_flag(directory: Path) -> None:
    change_settings(directory, is_marlin_format=True)


def repacked(*, part: str, scales: str) -> Plant:
    """Give the tensors of all linears the names of another packing."""

    def change(tensors: Tensors) -> None:
        for qweight in names_ending(tensors, ".qweight"):
            name = qweight.removesuffix(".qweight")
            for removed in ("qzeros", "g_idx"):
                del tensors[f"{name}.{removed}"]
            tensors[f"{name}.{part}"] = tensors.pop(qweight)
            tensors[f"{name}.{scales}"] = tensors.pop(f"{name}.scales")

    return lambda directory: change_tensors(directory, change)


def as_bytes(directory: Path) -> None:
    repacked(part="weight", scales="absmax")(directory)

    def change(tensors: Tensors) -> None:
        for name in names_ending(tensors, "proj.weight"):
            tensors[name] = tensors[name].view(torch.uint8)

    change_tensors(directory, change)


def as_bitsandbytes(directory: Path) -> None:
    as_bytes(directory)
    change_settings(directory, quant_method=None, load_in_4bit=True)


def as_awq(directory: Path) -> None:
    def change(tensors: Tensors) -> None:
        for name in names_ending(tensors, ".qweight"):
            rows, columns = tensors[name].shape
            tensors[name] = torch.zeros(8 * rows, columns // 8, dtype=torch.int32)

    change_tensors(directory, change)


def wider_words(directory: Path) -> None:
    change_tensors(
        directory,
        lambda tensors: tensors.update({f"{LAYER}.qweight": tensors[f"{LAYER}.qweight"].long()}),
    )


def no_settings(directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    del config["quantization_config"]
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "quantize_config.json").unlink()


def stored_twice(directory: Path) -> None:
    change_tensors(
        directory, lambda tensors: tensors.update({f"{LAYER}.weight": torch.ones(128, 64)})
    )


def settings(**values: object) -> Plant:
    return lambda directory: change_settings(directory, **values)


DEFECTS: dict[str, tuple[Plant, str, str]] = {
    "v2 zeros": (zeros_of_v2, "E_CKPT_ZEROS", "set checkpoint_format and format to gptq_v2"),
    "zero of 0": (zero_of_zero, "E_CKPT_ZEROS", "--sym or --format gptq_v2"),
    "unlike zero": (unlike_zero, "E_CKPT_ZEROS", "set sym to false"),
    "placeholder": (placeholder, "E_CKPT_GROUPS", "remove the g_idx tensors"),
    "empty g_idx": (empty_g_idx, "E_CKPT_SHAPE", "gptq verify"),
    "hidden order": (hidden_order, "E_CKPT_GROUPS", "set desc_act to true"),
    "lost order": (lost_order, "E_CKPT_INCOMPLETE", "gptq verify"),
    "marlin flag": (marlin_flag, "E_CKPT_QUANTIZED", "full-precision"),
    "marlin": (repacked(part="B", scales="s"), "E_CKPT_QUANTIZED", "full-precision"),
    "exl2": (repacked(part="q_weight", scales="q_scale"), "E_CKPT_QUANTIZED", "full-precision"),
    "awq": (as_awq, "E_CKPT_QUANTIZED", "full-precision"),
    "int64 said": (settings(pack_dtype="int64"), "E_CKPT_QUANTIZED", "full-precision"),
    "int64": (wider_words, "E_CKPT_SHAPE", "gptq verify"),
    "bytes": (as_bytes, "E_CKPT_QUANTIZED", "full-precision"),
    "bitsandbytes": (as_bitsandbytes, "E_CKPT_QUANTIZED", "full-precision"),
    "no settings": (no_settings, "E_CKPT_CONFIG", "put the quantize_config.json"),
    "no sym": (settings(sym=None), "E_CKPT_CONFIG", "correct it"),
    "5 bits": (settings(bits=5), "E_CKPT_CONFIG", "correct it"),
    "twice": (stored_twice, "E_CKPT_RULES", "remove one of the two"),
}
DECODING: dict[str, Callable[[Path, Path, Path], tuple[str | Path, ...]]] = {
    "dequantize": lambda packed, _, out: ("dequantize", packed, "-o", out),
    "convert": lambda packed, _, out: ("convert", packed, "--to", "gptq_v2", "-o", out),
    "compare": lambda packed, place, _: ("compare", packed, place / "model"),
    "reference": lambda packed, place, _: ("compare", place / "model", packed),
    "layer": lambda packed, *_: ("inspect", packed, "--layer", f"{LAYER}"),
    "eval-ppl": lambda packed, place, _: ("eval-ppl", packed, "--dataset", place / "text.txt"),
    "baseline": lambda packed, place, _: (
        "eval-ppl", place / "model", "--baseline", packed, "--dataset", place / "text.txt",
    ),
    "quantize": lambda packed, place, out: (
        "quantize", packed, "--allow-requantize", "-b4", "-g32",
        "--dataset", place / "text.txt", "-o", out,
    ),
}  # fmt: skip


@pytest.mark.parametrize("command", DECODING)
@pytest.mark.parametrize("defect", DEFECTS)
def test_weights_that_would_decode_wrongly_are_refused(
    defect: str, command: str, place: Path, packed: Path, gptq: Run, tmp_path: Path
) -> None:
    plant, code, hint = DEFECTS[defect]
    plant(packed)
    found = gptq(*DECODING[command](packed, place, tmp_path / "new"))
    printed = " ".join((found.stderr + found.stdout).split())
    assert found.exit_code == 3, printed
    assert not (tmp_path / "new").exists()
    if command == "quantize" and code not in printed:  # the plan found another defect before
        assert "error[E_CKPT_" in printed or "error[E_ARCH]" in printed
        return
    assert f"error[{code}]" in printed
    assert hint in printed or "full-precision" in printed


@pytest.mark.parametrize(
    "defect", [defect for defect in DEFECTS if DEFECTS[defect][1] != "E_CKPT_QUANTIZED"]
)
def test_verify_finds_the_defect_and_inspect_names_no_engine(
    defect: str, packed: Path, gptq: Run
) -> None:
    plant, code, hint = DEFECTS[defect]
    assert gptq("inspect", packed).stdout.count("loads in") == 1
    plant(packed)
    verified = gptq("verify", packed)
    assert verified.exit_code == 4
    assert code in verified.stdout
    assert hint in " ".join(verified.stderr.split()) or hint == "gptq verify"
    assert "loads in" not in gptq("inspect", packed).stdout


@pytest.mark.parametrize("defect", ["marlin flag", "marlin", "exl2", "bytes", "awq"])
def test_other_packings_under_the_name_gptq_are_defects(
    defect: str, packed: Path, gptq: Run
) -> None:
    DEFECTS[defect][0](packed)
    verified, inspected = gptq("verify", packed), gptq("inspect", packed)
    assert verified.exit_code == 4
    assert verified.stdout.startswith(
        "E_CKPT_QUANTIZED config.json: has format gptq, but its linears are packed for"
    )
    assert inspected.exit_code == 0
    assert "packed for" in inspected.stdout
    assert "loads in" not in inspected.stdout


def test_a_marlin_checkpoint_gets_no_hint_that_fails(
    packed: Path, gptq: Run, tmp_path: Path
) -> None:
    DEFECTS["marlin"][0](packed)
    found = gptq("quantize", packed, "-b", 4, "-o", tmp_path / "new")
    assert (found.exit_code, "--allow-requantize" in found.stderr) == (3, False)


def test_the_remedy_for_zeros_of_v2_works(
    place: Path, packed: Path, gptq: Run, tmp_path: Path
) -> None:
    zeros_of_v2(packed)
    change_settings(packed, checkpoint_format="gptq_v2", format="gptq_v2")
    assert gptq("convert", packed, "--to", "gptq", "-o", tmp_path / "new").exit_code == 0
    truth, found = (digest(folder) for folder in (place / "out", tmp_path / "new"))
    assert len(found) > 5
    assert all(found[name] == truth[name] for name in found if not name.startswith("gptq_"))


def test_the_remedy_works_with_checkpoint_format_alone(
    packed: Path, place: Path, gptq: Run, tmp_path: Path
) -> None:
    zeros_of_v2(packed)
    change_settings(packed, checkpoint_format="gptq_v2")
    assert gptq("convert", packed, "--to", "gptq", "-o", tmp_path / "new").exit_code == 0
    truth, found = (
        load_file(folder / "model.safetensors") for folder in (place / "out", tmp_path / "new")
    )
    assert all(torch.equal(tensor, found[name]) for name, tensor in truth.items())


def test_the_remedy_for_a_placeholder_works(
    place: Path, packed: Path, gptq: Run, tmp_path: Path
) -> None:
    def remove(tensors: Tensors) -> None:
        for name in names_ending(tensors, ".g_idx"):
            del tensors[name]

    change_tensors(packed, remove)
    assert gptq("verify", packed).exit_code == 4
    converted = gptq("convert", packed, "--to", "gptq", "-o", tmp_path / "new")
    assert converted.exit_code == 0
    assert "no g_idx" in converted.stdout
    truth, found = (
        load_file(folder / "model.safetensors") for folder in (place / "out", tmp_path / "new")
    )
    assert found.keys() == truth.keys()
    assert all(torch.equal(found[name], truth[name]) for name in truth)


@pytest.mark.parametrize(
    ("plant", "values"), [(hidden_order, {"desc_act": True}), (unlike_zero, {"sym": False})]
)
def test_the_remedies_by_a_setting_work(
    plant: Plant, values: dict[str, object], packed: Path, gptq: Run, tmp_path: Path
) -> None:
    plant(packed)
    assert gptq("dequantize", packed, "-o", tmp_path / "plain").exit_code == 3
    change_settings(packed, **values)
    assert gptq("verify", packed).exit_code == 0
    assert gptq("dequantize", packed, "-o", tmp_path / "plain").exit_code == 0


def in_one_file(directory: Path) -> None:
    """Put the settings into one file, as AutoGPTQ did in 2023."""
    no_settings_in_config(directory)
    published = {"bits": 4, "group_size": 32, "damp_percent": 0.01, "desc_act": False, "sym": True}
    published |= {"static_groups": False, "true_sequential": True, "model_name_or_path": None}
    published |= {"model_file_base_name": "gptq_model-4bit-32g"}
    (directory / "quantize_config.json").write_text(json.dumps(published))
    (directory / "model.safetensors").rename(directory / "gptq_model-4bit-32g.safetensors")


def no_settings_in_config(directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    del config["quantization_config"]
    (directory / "config.json").write_text(json.dumps(config))


def in_text_config(directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    config["text_config"] = {"quantization_config": config.pop("quantization_config")}
    (directory / "config.json").write_text(json.dumps(config))


def other_name(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "gptq_model-4bit-128g.safetensors")


def other_index(directory: Path) -> None:
    """Write two shards with the names that AutoGPTQ gave them."""
    tensors = sorted(load_file(directory / "model.safetensors").items())
    weight_map: dict[str, str] = {}
    for number, part in enumerate((tensors[:20], tensors[20:]), 1):
        file = f"gptq_model-4bit-128g-0000{number}-of-00002.safetensors"
        save_file(dict(part), directory / file, metadata={"format": "pt"})
        weight_map |= {name: file for name, _ in part}
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "gptq_model-4bit-128g.safetensors.index.json").write_text(json.dumps(index))
    (directory / "model.safetensors").unlink()


def stumbling_blocks(directory: Path) -> None:
    """Remove the method and add settings of which each stops some reader."""
    listed = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
    listed += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    more: dict[str, object] = {
        "meta": {"quantizer": ["a:1"]},
        "autoround_version": "0.1",
        "is_marlin_format": False,
    }
    change_settings(
        directory, quant_method=None, damp_percent=0.0, modules_in_block_to_quantize=listed, **more
    )


LENIENT: dict[str, Plant] = {
    "one file": in_one_file,
    "config.json without": no_settings_in_config,
    "text_config": in_text_config,
    "other name": other_name,
    "other index": other_index,
    "no method": settings(quant_method=None),
    "upper case": settings(quant_method="GPTQ"),
    "lm_head": settings(lm_head=True),
    "stumbling blocks": stumbling_blocks,
}


@dataclass(frozen=True)
class Converted:
    """A checkpoint, the one that `convert` makes of it, and the result of the command."""

    old: Path
    new: Path
    to: str
    result: Result


@pytest.fixture(scope="module", params=LENIENT)
def lenient(request: pytest.FixtureRequest) -> str:
    """Return the name of a form that some readers take and others refuse."""
    return str(request.param)


@pytest.fixture(scope="module", params=["gptq", "gptq_v2"])
def converted(
    lenient: str,
    place: Path,
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
) -> Converted:
    """Convert a checkpoint of the form `lenient` into the format of the parameter."""
    folder = tmp_path_factory.mktemp("converted")
    old, new = copy_of_another_tool(place, folder / "old"), folder / "new"
    LENIENT[lenient](old)
    with pytest.MonkeyPatch.context() as patch:
        remove_variables(patch)
        result = run_gptq("convert", old, "--to", request.param, "-o", new)
    return Converted(old, new, request.param, result)


def test_convert_corrects_what_some_readers_refuse(converted: Converted, gptq: Run) -> None:
    assert gptq("verify", converted.old).exit_code == 4
    assert "loads in" not in gptq("inspect", converted.old).stdout
    assert converted.result.exit_code == 0, converted.result.stderr
    expected = f"layers are now in format {converted.to}, corrected:"
    assert expected in converted.result.stdout
    assert gptq("verify", converted.new, "--full").exit_code == 0


def test_convert_writes_the_same_settings_into_both_files(converted: Converted) -> None:
    config = json.loads((converted.new / "config.json").read_text())
    second = json.loads((converted.new / "quantize_config.json").read_text())
    meta = second.pop("meta", {"quantizer": []})
    assert config["quantization_config"] == second
    assert list(meta) == ["quantizer"] or "calibration_sha256" in meta
    assert "quantization_config" not in config.get("text_config", {})


def test_convert_writes_settings_that_all_readers_take(converted: Converted) -> None:
    config = json.loads((converted.new / "config.json").read_text())
    written = config["quantization_config"]
    assert (written["quant_method"], written["lm_head"]) == ("gptq", False)
    assert (written["checkpoint_format"], written["format"]) == (converted.to, converted.to)
    assert None not in written.values()
    refused = {"meta", "is_marlin_format", "autoround_version", "model_file_base_name"}
    assert not refused & written.keys()
    assert 0 < written.get("damp_percent", 0.5) < 1
    listed = written.get("modules_in_block_to_quantize", [])
    assert all(isinstance(names, list) for names in listed)


def test_convert_keeps_the_weights(
    converted: Converted, place: Path, gptq: Run, tmp_path: Path
) -> None:
    assert [path.name for path in converted.new.glob("*.safetensors")] == ["model.safetensors"]
    assert gptq("dequantize", converted.new, "-o", tmp_path / "plain").exit_code == 0
    compared = gptq("compare", tmp_path / "plain", place / "out")
    assert compared.stdout.startswith("21 of 21 tensors are the same, 0 differ")


def test_convert_refuses_rules_that_it_cannot_correct(
    packed: Path, gptq: Run, tmp_path: Path
) -> None:
    change_settings(packed, dynamic={r"-:.*\.1\.mlp\.up_proj": {}})
    found = gptq("convert", packed, "--to", "gptq_v2", "-o", tmp_path / "new")
    assert (found.exit_code, (tmp_path / "new").exists()) == (3, False)
    assert "error[E_CKPT_RULES]" in found.stderr
    assert "gptq verify" in found.stderr
    assert gptq("dequantize", packed, "-o", tmp_path / "plain").exit_code == 0


def test_names_with_line_breaks_forge_no_line(packed: Path, gptq: Run, tmp_path: Path) -> None:
    evil = "model.layers.0.mlp.up_proj\nerror[E_FORGED]: x"

    def change(tensors: Tensors) -> None:
        for part in ("qweight", "qzeros", "scales"):
            tensors[f"{evil}.{part}"] = tensors[f"{LAYER}.{part}"].clone()

    change_tensors(packed, change)
    convert = ("convert", packed, "--to", "gptq", "-o", tmp_path / "new")
    for arguments in (("inspect", packed), convert):
        found = gptq(*arguments)
        assert found.exit_code == 0, found.stderr
        assert "no g_idx" in found.stdout
        for line in (found.stdout + found.stderr).splitlines():
            assert not line.startswith("error[")


def test_dequantize_removes_the_quantization_settings(
    packed: Path, gptq: Run, tmp_path: Path
) -> None:
    in_text_config(packed)
    assert gptq("dequantize", packed, "-o", tmp_path / "plain").exit_code == 0
    assert "quantization_config" not in (tmp_path / "plain" / "config.json").read_text()
    assert gptq("inspect", tmp_path / "plain", "-q").stdout == "not quantized\n"


def test_dequantize_does_not_transpose_the_head_of_gpt2(
    gptq: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 128, "vocab_size": 512}
    monkeypatch.setitem(FAMILIES, "gpt2", sizes)
    source, _ = quantize(tmp_path, save_model(tmp_path / "model", "gpt2"), bits=8, lm_head=True)
    assert gptq("dequantize", source, "-o", tmp_path / "plain").exit_code == 0
    plain, original = (
        load_file(tmp_path / name / "model.safetensors") for name in ("plain", "model")
    )
    table = next(tensor for name, tensor in original.items() if name.endswith("wte.weight"))
    assert plain["lm_head.weight"].shape == table.shape == (512, 64)
    assert torch.allclose(plain["lm_head.weight"], table, atol=1e-2)
