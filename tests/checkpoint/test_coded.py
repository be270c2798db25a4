"""Every form of weights in codes is read as the numbers it stands for, or refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from gptq_cli.checkpoint.decoded import plain_view
from gptq_cli.checkpoint.reader import open_reader
from gptq_cli.checkpoint.source import Checkpoint, open_checkpoint
from gptq_cli.errors import InputError
from gptq_cli.inspection.summary import inspect_checkpoint
from tests.coded import Example, awq, fp8, grouped, int8, mxfp4, nvfp4, packed, random_bytes

ROWS, COLUMNS = 64, 64
MODULES = ("model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj")
NORM = "model.layers.0.norm.weight"
FP8 = {"quant_method": "fp8", "weight_block_size": [20, 24]}
MODELOPT = {"quant_method": "modelopt", "producer": {"name": "modelopt"}}
FLOAT = {"num_bits": 8, "type": "float", "strategy": "channel"}


def fp8_example(
    scales: Tensor, block: tuple[int, int], settings: dict[str, Any], form: str, **name: str
) -> Example:
    return Example(*fp8(ROWS, COLUMNS, scales, block, **name), settings, form)


def one_scale() -> Example:
    settings = {"quant_method": "fp8", "weight_block_size": None, "activation_scheme": "static"}
    name = "weight_scale_inv"
    scale, block = torch.tensor(0.0123), (ROWS, COLUMNS)
    return fp8_example(scale, block, settings, "fp8 with one scale", name=name)


def scale_of_each_row() -> Example:
    scales = (torch.rand(ROWS, 1) / 100).bfloat16()
    settings = grouped(FLOAT, "float-quantized")
    return fp8_example(scales, (1, COLUMNS), settings, "fp8 with a scale for each row")


def vector_of_scales() -> Example:
    settings = {"quant_method": "fbgemm_fp8"}
    return fp8_example(
        torch.rand(ROWS) / 100, (1, COLUMNS), settings, "fp8 with a scale for each row"
    )


def scale_of_each_group() -> Example:
    settings = grouped(FLOAT | {"strategy": "group", "group_size": 16}, "float-quantized")
    return fp8_example(torch.rand(ROWS, 4) / 100, (1, 16), settings, "fp8 in groups of 16")


def scale_of_each_block() -> Example:
    weights = FLOAT | {"strategy": "block", "block_structure": [20, 24]}
    settings = grouped(weights, "float-quantized")
    return fp8_example(torch.rand(4, 3) / 100, (20, 24), settings, "fp8 in blocks of 20x24")


def powers_of_blocks() -> Example:
    scales = random_bytes(4, 3, low=115, high=125)
    example = fp8_example(scales, (20, 24), FP8, "fp8 in blocks of 20x24", name="scale")
    example.parts["scale"] = scales.view(torch.float8_e8m0fnu)
    return example


def mxfp8() -> Example:
    settings = MODELOPT | {"quant_algo": "MXFP8"}
    scales = random_bytes(ROWS, COLUMNS // 32, low=115, high=125)
    return fp8_example(scales, (1, 32), settings, "mxfp8 in groups of 32")


def mxfp4_packed() -> Example:
    codes, scales, weight = mxfp4(ROWS, COLUMNS)
    settings = grouped({"num_bits": 4, "type": "float"}, "mxfp4-pack-quantized")
    parts = {"weight_packed": codes, "weight_scale": scales}
    return Example(parts, weight, settings, "mxfp4 in groups of 32")


def mxfp4_in_bytes() -> Example:
    codes, scales, weight = mxfp4(ROWS, COLUMNS)
    parts = {"weight": codes.view(torch.int8), "scale": scales.view(torch.float8_e8m0fnu)}
    return Example(parts, weight, FP8, "mxfp4 in groups of 32")


def nvfp4_divided() -> Example:
    codes, scales, of_all, weight = nvfp4(ROWS, COLUMNS, 1234.5, divides=True)
    settings = grouped({"num_bits": 4, "type": "float"}, "nvfp4-pack-quantized")
    parts = {"weight_packed": codes, "weight_scale": scales}
    parts |= {"weight_global_scale": of_all.reshape(1), "input_global_scale": torch.ones(1)}
    return Example(parts, weight, settings, "nvfp4 in groups of 16")


def nvfp4_multiplied() -> Example:
    codes, scales, of_all, weight = nvfp4(ROWS, COLUMNS, 0.00123, divides=False)
    parts = {"weight": codes, "weight_scale": scales, "weight_scale_2": of_all}
    parts["input_scale"] = torch.tensor(1.0)
    return Example(parts, weight, MODELOPT | {"quant_algo": "NVFP4"}, "nvfp4 in groups of 16")


def int8_symmetric() -> Example:
    settings = grouped(FLOAT | {"type": "int"}, "int-quantized")
    parts, weight = int8(ROWS, COLUMNS, COLUMNS, asymmetric=False)
    return Example(parts, weight, settings, "int8 with a scale for each row")


def int8_asymmetric() -> Example:
    weights = FLOAT | {"type": "int", "strategy": "group", "group_size": 16, "symmetric": False}
    parts, weight = int8(ROWS, COLUMNS, 16, asymmetric=True)
    return Example(parts, weight, grouped(weights, "int-quantized"), "int8 in groups of 16")


def packed_symmetric() -> Example:
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 16}
    parts, weight = packed(ROWS, COLUMNS, 16, asymmetric=False)
    form = "pack-quantized, 4 bits group_size 16"
    return Example(parts, weight, grouped(weights, "pack-quantized"), form)


def packed_asymmetric() -> Example:
    weights = {"num_bits": 4, "type": "int", "strategy": "channel", "symmetric": False}
    parts, weight = packed(ROWS, COLUMNS, COLUMNS, asymmetric=True)
    form = "pack-quantized, 4 bits group_size -1"
    return Example(parts, weight, grouped(weights, "mixed-precision"), form)


def awq_gemm() -> Example:
    settings = {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm"}
    return Example(*awq(ROWS, COLUMNS, 16), settings, "awq, 4 bits group_size 16")


FORMS = [
    one_scale, scale_of_each_row, vector_of_scales, scale_of_each_group, scale_of_each_block,
    powers_of_blocks, mxfp8, mxfp4_packed, mxfp4_in_bytes, nvfp4_divided, nvfp4_multiplied,
    int8_symmetric, int8_asymmetric, packed_symmetric, packed_asymmetric, awq_gemm,
]  # fmt: skip
OF_INTEGERS = {int8_symmetric, int8_asymmetric, packed_symmetric, packed_asymmetric, awq_gemm}


def save(directory: Path, tensors: dict[str, Tensor], settings: object, **config: object) -> Path:
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    content = {"dtype": "bfloat16", "quantization_config": settings, **config}
    (directory / "config.json").write_text(json.dumps(content))
    return directory


def saved(directory: Path, *examples: Example) -> Checkpoint:
    """Save one linear for each example, a norm, and a scale of the cache; open the checkpoint."""
    tensors = {NORM: torch.ones(COLUMNS), "model.layers.0.k_scale": torch.ones(1)}
    for module, example in zip(MODULES, examples, strict=False):
        for part, tensor in example.parts.items():
            tensors[f"{module}.{part}"] = tensor
    return open_checkpoint(save(directory, tensors, examples[0].settings))


@pytest.mark.parametrize("form", FORMS)
def test_weights_in_codes_are_the_numbers_they_stand_for(
    form: Callable[[], Example], tmp_path: Path
) -> None:
    torch.manual_seed(FORMS.index(form))
    examples = [form(), form()]
    checkpoint = saved(tmp_path, *examples)
    plain = plain_view(checkpoint, allow_requantize=True)
    reader = open_reader(checkpoint)
    names = [f"{module}.weight" for module in MODULES]
    assert (plain.how, plain.rounded) == (examples[0].form, form in OF_INTEGERS)
    assert set(reader.names()) == set(plain.tensors) == {*names, NORM}
    assert "model.layers.0.k_scale" in plain.left_out
    for name, example in zip(names, examples, strict=True):
        read = reader.read(name)
        assert example.weight.float().abs().max() > 0
        assert torch.equal(read, example.weight), name
        assert (plain.tensors[name].shape, plain.tensors[name].dtype) == ((ROWS, COLUMNS), "BF16")
        stored = {f"{name.removesuffix('weight')}{part}" for part in example.parts}
        assert stored <= {*plain.parts[name], *plain.left_out}


@pytest.mark.parametrize("form", FORMS)
def test_inspect_shows_the_form_and_its_bytes(form: Callable[[], Example], tmp_path: Path) -> None:
    example = form()
    found = inspect_checkpoint(saved(tmp_path, example))
    (row,) = found.quantized
    counted = {part for part in example.parts if "input" not in part}
    assert (row.name, row.shape, row.settings) == ("mlp.up_proj", (ROWS, COLUMNS), example.form)
    assert row.nbytes == sum(example.parts[part].nbytes for part in counted)
    others = 1 + len(example.parts) - len(counted)
    assert found.parameters == ROWS * COLUMNS + COLUMNS + others
    assert found.nbytes == sum(tensor.nbytes for tensor in example.parts.values()) + 4 * COLUMNS + 4


def test_packed_zero_points_of_odd_numbers_are_refused(tmp_path: Path) -> None:
    example = packed_asymmetric()
    module, cut = MODULES[0], {"weight_packed": 48, "weight_scale": 48, "weight_zero_point": 6}
    tensors = {f"{module}.{part}": tensor for part, tensor in example.parts.items()}
    for part, rows in cut.items():
        tensors[f"{module}.{part}"] = tensors[f"{module}.{part}"][:rows].clone()
    save(tmp_path, tensors, example.settings)
    with pytest.raises(InputError, match=r"is I32 \[6, 1\], but .* multiples of 32") as caught:
        open_checkpoint(tmp_path)
    assert (caught.value.code, caught.value.exit_code) == ("E_CKPT_SHAPE", 3)


def test_one_checkpoint_may_mix_floats_and_packed_integers(tmp_path: Path) -> None:
    floats, integers = scale_of_each_row(), packed_symmetric()
    groups = {"a": floats, "b": integers}
    settings = {**floats.settings, "format": "mixed-precision"}
    settings["config_groups"] = {
        name: example.settings["config_groups"]["group_0"] for name, example in groups.items()
    }
    floats.settings.update(settings)
    checkpoint = saved(tmp_path, floats, integers)
    plain = plain_view(checkpoint, allow_requantize=True)
    assert plain.how == f"{integers.form}, {floats.form}"
    assert plain.rounded
    for module, example in zip(MODULES, (floats, integers), strict=True):
        read = open_reader(checkpoint).read(f"{module}.weight")
        assert torch.equal(read, example.weight)


def test_experts_of_gpt_oss_are_read_as_a_stack(tmp_path: Path) -> None:
    experts, rows, columns = 3, 24, 64
    blocks, exponents, weights = [], [], []
    for _ in range(experts):
        codes, scales, weight = mxfp4(rows, columns)
        blocks.append(codes.view(rows, columns // 32, 16))
        exponents.append(scales)
        weights.append(weight.T)
    name = "model.layers.0.mlp.experts.down_proj"
    tensors = {f"{name}_blocks": torch.stack(blocks), f"{name}_scales": torch.stack(exponents)}
    tensors[f"{name}_bias"] = torch.ones(experts, rows)
    checkpoint = open_checkpoint(save(tmp_path, tensors, {"quant_method": "mxfp4"}))
    reader = open_reader(checkpoint)
    assert set(reader.names()) == {name, f"{name}_bias"}
    assert torch.equal(reader.read(name), torch.stack(weights))
    assert reader.read(name).data_ptr() == reader.read(name).data_ptr()  # decoded once
    reader.release()
    assert torch.equal(reader.read(name), torch.stack(weights))


def test_settings_of_modelopt_may_stand_in_a_file_of_their_own(tmp_path: Path) -> None:
    example = nvfp4_multiplied()
    tensors = {f"{MODULES[0]}.{part}": tensor for part, tensor in example.parts.items()}
    save(tmp_path, tensors, None)
    settings = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4"}}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(settings))
    checkpoint = open_checkpoint(tmp_path)
    assert torch.equal(open_reader(checkpoint).read(f"{MODULES[0]}.weight"), example.weight)
    assert not [file for file in checkpoint.other_files() if file.suffix == ".json"]


Change = Callable[[dict[str, Tensor], str], object]


def without(part: str) -> Change:
    return lambda tensors, module: tensors.pop(f"{module}.{part}")


def with_part(part: str, tensor: Tensor) -> Change:
    return lambda tensors, module: tensors.update({f"{module}.{part}": tensor})


REFUSED: list[tuple[Callable[[], Example], Change, str, str]] = [
    (scale_of_each_row, without("weight_scale"), "E_CKPT_INCOMPLETE",
     "is stored as F8_E4M3, but its scales `.*up_proj.weight_scale` are missing"),
    (scale_of_each_row, with_part("weight_scale", torch.ones(3, 1)), "E_CKPT_FP8",
     "holds F8_E4M3 weights, first `.*up_proj.weight`, in a form that is not read here"),
    (scale_of_each_row, with_part("weight_scale", torch.ones(ROWS, 1).int()), "E_CKPT_SHAPE",
     "weight_scale` is I32 .*, but .* asks for floats or exponents"),
    (scale_of_each_row, with_part("bitmask", torch.ones(2)), "E_CKPT_FP8", "has a bitmask, which"),
    (nvfp4_multiplied, with_part("pre_quant_scale", torch.ones(2)), "E_CKPT_FP8",
     "`model.layers.0.mlp.up_proj` has a pre_quant_scale, which is not read here"),
    (nvfp4_multiplied, without("weight_scale_2"), "E_CKPT_INCOMPLETE",
     "stored as nvfp4, but `.*weight_global_scale` or `.*weight_scale_2` is missing"),
    (nvfp4_divided, with_part("weight_global_scale", torch.ones(2)), "E_CKPT_SHAPE",
     "must be one F32 number"),
    (mxfp4_packed, with_part("weight_scale", random_bytes(ROWS, 1)), "E_CKPT_SHAPE",
     r"is U8 \[64, 1\], but .* asks for \[64, 2\] in groups of 32"),
    (mxfp4_packed, with_part("weight_scale", torch.ones(ROWS, 2)), "E_CKPT_FP8",
     "holds U8 weights"),
    (mxfp4_packed, with_part("other", torch.ones(2).to(torch.float8_e5m2)), "E_CKPT_FP8",
     "holds F8_E5M2 weights, first `model.layers.0.mlp.up_proj.other`"),
    (int8_symmetric, without("weight_scale"), "E_CKPT_INCOMPLETE", "is stored as I8, but its"),
    (int8_symmetric, with_part("weight_scale", torch.ones(5)), "E_CKPT_SHAPE",
     "asks for floats of rows"),
    (int8_asymmetric, with_part("weight_zero_point", random_bytes(ROWS, 1)), "E_CKPT_SHAPE",
     "zero_point` is U8 .*, but its scales have the shape"),
    (int8_asymmetric, without("weight_zero_point"), "E_CKPT_INCOMPLETE",
     "`.*up_proj` is asymmetric by config.json, but its zero points `.*_zero_point` are missing"),
    (packed_asymmetric, without("weight_zero_point"), "E_CKPT_INCOMPLETE",
     "`.*up_proj` is asymmetric by config.json, but its zero points `.*_zero_point` are missing"),
    (packed_symmetric, without("weight_shape"), "E_CKPT_INCOMPLETE",
     "has a weight_packed but no weight_shape"),
    (packed_symmetric, with_part("weight_scale", torch.ones(ROWS, 3)), "E_CKPT_INCOMPLETE",
     "the parts of `.*up_proj` do not fit each other"),
    (awq_gemm, without("qzeros"), "E_CKPT_INCOMPLETE", "has a qweight but no qzeros"),
    (awq_gemm, with_part("scales", torch.ones(3, ROWS).half()), "E_CKPT_QUANTIZED",
     "packed by AWQ in another way than version gemm with 4 bits"),
]  # fmt: skip


@pytest.mark.parametrize(("form", "change", "code", "message"), REFUSED)
def test_weights_in_codes_that_do_not_fit_are_refused(
    form: Callable[[], Example], change: Change, code: str, message: str, tmp_path: Path
) -> None:
    example = form()
    tensors = {f"{MODULES[0]}.{part}": tensor for part, tensor in example.parts.items()}
    change(tensors, MODULES[0])
    save(tmp_path, tensors, example.settings)
    with pytest.raises(InputError, match=message) as caught:
        open_checkpoint(tmp_path)
    assert (caught.value.code, caught.value.exit_code) == (code, 3)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("key", "value"), [("transform_config", {"R1": {}}), ("sparsity_config", {"format": "24"})]
)
def test_transforms_and_sparse_weights_are_refused(key: str, value: object, tmp_path: Path) -> None:
    example = scale_of_each_row()
    tensors = {f"{MODULES[0]}.{part}": tensor for part, tensor in example.parts.items()}
    save(tmp_path, tensors, {**example.settings, key: value})
    with pytest.raises(InputError, match=f"is quantized with {key}, which is not read") as caught:
        open_checkpoint(tmp_path)
    assert (caught.value.code, caught.value.exit_code) == ("E_CKPT_FP8", 3)
    assert "gptq explain E_CKPT_FP8" in (caught.value.hint or "")


@pytest.mark.parametrize("form", sorted(OF_INTEGERS, key=lambda form: form.__name__))
def test_integers_are_rounded_again_on_request_only(
    form: Callable[[], Example], tmp_path: Path
) -> None:
    checkpoint = saved(tmp_path, form())
    with pytest.raises(InputError, match="is already quantized") as caught:
        plain_view(checkpoint)
    assert (caught.value.code, caught.value.exit_code) == ("E_CKPT_QUANTIZED", 3)
    assert (caught.value.hint or "").endswith("second time: --allow-requantize")


def test_bitsandbytes_is_refused_with_the_way_out(tmp_path: Path) -> None:
    tensors = {f"{MODULES[0]}.weight": random_bytes(1536, 1), NORM: torch.ones(8)}
    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    checkpoint = open_checkpoint(save(tmp_path, tensors, settings))
    with pytest.raises(InputError, match=r"already quantized \(bitsandbytes\)") as caught:
        plain_view(checkpoint, allow_requantize=True)
    assert (caught.value.code, caught.value.exit_code) == ("E_CKPT_QUANTIZED", 3)
    assert "`model.dequantize()` and `model.save_pretrained(DIR)`" in (caught.value.hint or "")
