"""Sound checkpoints of every tool pass; each kind of defect is found by code and tensor."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gptq_cli.checkpoint.defects import Defect
from gptq_cli.checkpoint.headers import unpack_words
from gptq_cli.checkpoint.verify import verify_checkpoint
from gptq_cli.errors import InputError
from tests.checkpoint.gptq_files import (
    HIDDEN,
    MODULES,
    SHAPES,
    SHARDS,
    Files,
    gptq_files,
    module,
    words,
)

Q0, DOWN1 = MODULES[0], MODULES[5]


def defects(directory: Path, *, full: bool = False) -> list[Defect]:
    return list(verify_checkpoint(directory, full=full).defects)


@pytest.mark.parametrize("desc_act", [False, True])
@pytest.mark.parametrize("group_size", [-1, 32, 64])
@pytest.mark.parametrize("format", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_sound_checkpoints_of_every_setting_pass(
    bits: int, sym: bool, format: str, group_size: int, desc_act: bool, tmp_path: Path
) -> None:
    files = gptq_files(bits, group_size, sym, format, desc_act)
    found = verify_checkpoint(files.write(tmp_path / "c"), full=True)
    assert found.defects == ()
    assert (found.modules, found.bits, found.format) == (len(MODULES), (bits,), format)
    assert found.tensors == len(files.tensors)
    assert found.nbytes == sum(array.nbytes for array in files.tensors.values())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_unpack_words_reverses_packing(bits: int) -> None:
    row, column = np.ogrid[0:3, 0:64]
    codes = (7 * column + row * column) % 2**bits
    packed = np.array([words(codes_of_row, bits) for codes_of_row in codes.tolist()], np.int32)
    assert unpack_words(packed, bits).tolist() == codes.tolist()


def as_autogptq(files: Files) -> None:
    files.shards, files.quantize_config = 1, files.config.pop("quantization_config")
    files.quantize_config["checkpoint_format"] = "gptq"
    del files.quantize_config["format"], files.quantize_config["quant_method"]


def as_gptqmodel(files: Files) -> None:
    files.quantize_config = dict(files.quantization, meta={"quantizer": ["gptqmodel:7.7.0"]})
    files.quantization["meta"] = {"quantizer": ["gptqmodel:7.7.0"]}
    files.quantization["pack_dtype"] = "int32"
    files.quantization["dynamic"] = {
        r"-:.*layers\.1\.mlp\.gate$": {},
        r"+:.*down_proj": {"group_size": 64},
    }
    for block in range(2):
        name = f"model.layers.{block}.mlp.down_proj"
        for part, array in module((64, 128), 4, 64, True, "gptq", False, block).items():
            files.tensors[f"{name}.{part}"] = array


def as_autoround(files: Files) -> None:
    files.quantization.update(
        {"autoround_version": "0.15.1", "iters": 0, "modules_in_block_to_quantize": list(MODULES)}
    )
    for name in MODULES:
        files.tensors[f"{name}.scales"] = files.tensors[f"{name}.scales"].astype(np.float32)
        files.tensors[f"{name}.g_idx"] = files.tensors[f"{name}.g_idx"].astype(np.int64)


def as_optimum(files: Files) -> None:
    inner = [[name.split(".", 3)[3]] for name in MODULES[:3]]
    files.quantization.update(
        {"modules_in_block_to_quantize": inner, "dataset": "wikitext2", "model_seqlen": 2048}
    )
    del files.quantization["format"], files.quantization["checkpoint_format"]


def in_text_config(files: Files) -> None:
    files.config["text_config"] = {"quantization_config": files.config.pop("quantization_config")}


def without_method(files: Files) -> None:
    del files.quantization["quant_method"]


def without_sym(files: Files) -> None:
    del files.quantization["sym"]


def v2_by_one_key(files: Files) -> None:
    files.quantization["format"] = "gptq_v2"
    del files.quantization["checkpoint_format"]
    for name in MODULES:
        files.tensors[f"{name}.qzeros"] += 0x11111111


def two_formats(files: Files) -> None:
    files.quantize_config = dict(files.quantization, checkpoint_format="gptq_v2", format="gptq_v2")


def with_an_adapter(files: Files) -> None:
    files.extra["adapter_config.json"] = b"{}"


def with_other_weights(files: Files) -> None:
    files.shards = 1
    files.extra["gptq_model-4bit-32g.safetensors"] = b"x"


def no_settings(files: Files) -> None:
    del files.config["quantization_config"]


def marlin_flag(files: Files) -> None:
    files.quantization["is_marlin_format"] = True


def marlin_tensors(files: Files) -> None:
    for name in MODULES:
        for part in ("qweight", "qzeros", "g_idx"):
            del files.tensors[f"{name}.{part}"]
        files.tensors[f"{name}.s"] = files.tensors.pop(f"{name}.scales")
        files.tensors[f"{name}.B"] = np.zeros((4, 64), np.int32)


def awq_tensors(files: Files) -> None:
    for name in MODULES:
        out_features, in_features = SHAPES[name.split(".", 3)[3]]
        del files.tensors[f"{name}.g_idx"]
        files.tensors[f"{name}.qweight"] = np.zeros((in_features, out_features // 8), np.int32)


def with_an_mtp_block(files: Files) -> None:
    for part, array in {"q_proj": (32, 64), "k_proj": (32, 64)}.items():
        files.tensors[f"model.layers.2.self_attn.{part}.weight"] = np.ones(array, np.float16)


def with_a_kept_linear(files: Files) -> None:
    kept = MODULES[3]
    unpack(files, kept)
    files.quantization["dynamic"] = {"-:" + kept.replace(".", r"\.") + "$": {}}
    quantized = [name for name in MODULES if name != kept]
    files.quantization["modules_in_block_to_quantize"] = [quantized]


def with_a_head(files: Files) -> None:
    del files.tensors["lm_head.weight"]
    for part, array in module((64, HIDDEN), 4, 32, True, "gptq", False, 9).items():
        files.tensors[f"lm_head.{part}"] = array
    files.quantization["lm_head"] = True
    files.config["tie_word_embeddings"] = False


def with_biases(files: Files) -> None:
    files.tensors[f"{Q0}.bias"] = np.zeros(32, np.float16)


@pytest.mark.parametrize(
    "change",
    [
        as_gptqmodel,
        as_autoround,
        as_optimum,
        with_an_mtp_block,
        with_a_kept_linear,
        with_a_head,
        with_biases,
    ],
)
def test_checkpoints_of_other_tools_pass(change: Callable[[Files], None], tmp_path: Path) -> None:
    files = gptq_files()
    change(files)
    assert defects(files.write(tmp_path / "c"), full=True) == []


def unpack(files: Files, name: str) -> None:
    """Replace the packed tensors of a linear by a plain weight."""
    for part in ("qweight", "qzeros", "scales", "g_idx"):
        del files.tensors[f"{name}.{part}"]
    files.tensors[f"{name}.weight"] = np.ones((32, 64), np.float16)


def put(name: str, value: object) -> Callable[[Files], None]:
    """Return a change of one setting in the configuration."""
    return lambda files: files.quantization.update({name: value})


def drop(name: str) -> Callable[[Files], None]:
    """Return a change that removes a tensor."""
    return lambda files: files.tensors.pop(name)


def set_at(name: str, place: tuple[int, ...], value: float) -> Callable[[Files], None]:
    def plant(files: Files) -> None:
        files.tensors[name][place] = value

    return plant


def swap(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Files], None]:
    def plant(files: Files) -> None:
        files.tensors[name] = np.ascontiguousarray(change(files.tensors[name]))

    return plant


def zeros_as_v2(files: Files) -> None:
    files.quantization.update({"checkpoint_format": "gptq_v2", "format": "gptq_v2"})


def format_of_nothing(files: Files) -> None:
    files.quantization["checkpoint_format"] = files.quantization.pop("format")[:0]


def wrapped_zero(files: Files) -> None:
    files.quantization["sym"] = False
    files.tensors[f"{Q0}.qzeros"][1, 2] |= 0xF0


def lost_block(files: Files) -> None:
    for name in list(files.tensors):
        if ".layers.0." in name:
            del files.tensors[name]


def two_configs(files: Files) -> None:
    files.quantize_config = dict(files.quantization, bits=8)


def unused_head(files: Files) -> None:
    with_a_head(files)
    files.quantization["lm_head"] = False


def tied_head(files: Files) -> None:
    with_a_head(files)
    files.config["tie_word_embeddings"] = True


def both_forms(files: Files) -> None:
    files.tensors[f"{Q0}.weight"] = np.ones((32, 64), np.float16)


def no_codes(files: Files) -> None:
    for name in MODULES:
        unpack(files, name)


PLANTED = {
    "bits": (put("bits", 8), "SHAPE", f"{Q0}.qweight", "ask for [16, 32]"),
    "bits unknown": (put("bits", 5), "CONFIG", None, "bits is 5"),
    "bits as text": (put("bits", "4"), "CONFIG", None, "bits is '4'"),
    "group size": (put("group_size", 64), "SHAPE", f"{Q0}.qzeros", "ask for [1, 4]"),
    "group size 0": (put("group_size", 0), "CONFIG", None, "group_size is 0"),
    "group size 48": (put("group_size", 48), "SHAPE", Q0, "cannot be packed"),
    "no sym": (without_sym, "CONFIG", None, "sym is missing"),
    "desc_act as text": (put("desc_act", "false"), "CONFIG", None, "desc_act is 'false'"),
    "upper case": (put("quant_method", "GPTQ"), "CONFIG", None, "transformers knows only 'gptq'"),
    "formats differ": (put("format", "gptq_v2"), "CONFIG", None, "readers take one or the other"),
    "format as mapping": (put("format", {}), "CONFIG", None, "readers take one or the other"),
    "format of nothing": (
        format_of_nothing,
        "CONFIG",
        None,
        "format is None and checkpoint_format ''",
    ),
    "two configs": (
        two_configs,
        "CONFIG",
        None,
        "bits is 4 in config.json and 8 in quantize_config.json",
    ),
    "bad rule": (put("dynamic", {"-:(": {}}), "CONFIG", None, "not a regular expression"),
    "bad rules": (put("dynamic", ["-:x"]), "CONFIG", None, "not a mapping"),
    "bad override": (put("dynamic", {"+:.*q_proj": {"bits": 7}}), "CONFIG", None, "bits is 7"),
    "bad list": (put("modules_in_block_to_quantize", [[4]]), "CONFIG", None, "list of lists"),
    "only in quantize_config": (
        as_autogptq,
        "CONFIG",
        None,
        "stands in quantize_config.json alone",
    ),
    "in text_config": (
        in_text_config,
        "CONFIG",
        None,
        "stands in text_config: transformers would not see it",
    ),
    "no method": (without_method, "CONFIG", None, "quant_method is missing"),
    "v2 by one key": (v2_by_one_key, "CONFIG", None, "llama.cpp would not take format 'gptq_v2'"),
    "two formats": (
        two_formats,
        "CONFIG",
        None,
        "is 'gptq' in config.json and 'gptq_v2' in quantize_config.json",
    ),
    "no settings": (
        no_settings,
        "CONFIG",
        None,
        "neither config.json nor quantize_config.json describes",
    ),
    "marlin flag": (marlin_flag, "QUANTIZED", None, "packed for Marlin"),
    "marlin tensors": (marlin_tensors, "QUANTIZED", None, "packed for Marlin"),
    "awq tensors": (awq_tensors, "QUANTIZED", None, "packed for AWQ"),
    "adapter": (with_an_adapter, "KIND", None, "an adapter of another model"),
    "other weights": (with_other_weights, "INDEX", None, "beside the weights"),
    "no qweight": (drop(f"{Q0}.qweight"), "INCOMPLETE", Q0, "no qweight"),
    "no qzeros": (drop(f"{Q0}.qzeros"), "INCOMPLETE", Q0, "no qzeros"),
    "no scales": (drop(f"{Q0}.scales"), "INCOMPLETE", Q0, "no scales"),
    "no g_idx": (drop(f"{DOWN1}.g_idx"), "INCOMPLETE", DOWN1, "no g_idx"),
    "lost block": (lost_block, "INCOMPLETE", "model.layers.0", "no tensor of"),
    "more blocks in the config": (
        lambda files: files.config.update(num_hidden_layers=3),
        "INCOMPLETE",
        "model.layers.2",
        "no tensor",
    ),
    "words as int64": (
        swap(f"{Q0}.qweight", lambda a: a.astype(np.int64)),
        "SHAPE",
        f"{Q0}.qweight",
        "I64, not I32",
    ),
    "scales as float64": (
        swap(f"{Q0}.scales", lambda a: a.astype(np.float64)),
        "SHAPE",
        f"{Q0}.scales",
        "F64, not F16",
    ),
    "scales turned": (swap(f"{DOWN1}.scales", lambda a: a.T), "SHAPE", DOWN1, "4 outputs"),
    "qweight turned": (
        swap(f"{Q0}.qweight", lambda a: a.T),
        "SHAPE",
        f"{Q0}.qweight",
        "has shape [32, 8]",
    ),
    "short bias": (
        lambda f: f.tensors.update({f"{Q0}.bias": np.ones(31, np.float16)}),
        "SHAPE",
        f"{Q0}.bias",
        "[32]",
    ),
    "group too large": (
        set_at(f"{Q0}.g_idx", (5,), 2),
        "GROUPS",
        f"{Q0}.g_idx",
        "0 to 2, but there are 2 groups",
    ),
    "group negative": (set_at(f"{Q0}.g_idx", (5,), -1), "GROUPS", f"{Q0}.g_idx", "-1 to 1"),
    "group uneven": (
        set_at(f"{Q0}.g_idx", (5,), 1),
        "GROUPS",
        f"{Q0}.g_idx",
        "group 0 has 31 of the columns, not 32",
    ),
    "all in one group": (
        swap(f"{DOWN1}.g_idx", np.zeros_like),
        "GROUPS",
        f"{DOWN1}.g_idx",
        "group 0 has 128",
    ),
    "hidden order": (
        swap(f"{DOWN1}.g_idx", lambda a: a[::-1]),
        "GROUPS",
        f"{DOWN1}.g_idx",
        "desc_act is false",
    ),
    "mislabelled v2": (
        zeros_as_v2,
        "ZEROS",
        f"{Q0}.qzeros",
        "as gptq stores them, but config.json names gptq_v2",
    ),
    "one odd zero": (
        set_at(f"{DOWN1}.qzeros", (1, 2), 0x77767777),
        "ZEROS",
        f"{DOWN1}.qzeros",
        "1 of 256 zero points are not 8",
    ),
    "wrapped zero": (wrapped_zero, "ZEROS", f"{Q0}.qzeros", "1 of 64 zero points are 0"),
    "scale zero": (
        set_at(f"{Q0}.scales", (1, 3), 0),
        "SCALES",
        f"{Q0}.scales",
        "1 of 64 scales are zero",
    ),
    "scale too small": (
        swap(f"{Q0}.scales", lambda a: a.astype(np.float32) * 1e-7),
        "SCALES",
        f"{Q0}.scales",
        "64 of 64 scales are zero",
    ),
    "weight beyond": (
        set_at(f"{Q0}.scales", (1, 3), 9000),
        "NONFINITE",
        f"{Q0}.qweight",
        "weights are beyond float16",
    ),
    "weights beyond": (
        set_at(f"{DOWN1}.scales", (2, 5), -30000),
        "NONFINITE",
        f"{DOWN1}.qweight",
        "are beyond float16",
    ),
    "scale infinite": (
        set_at(f"{Q0}.scales", (1, 3), np.inf),
        "NONFINITE",
        f"{Q0}.scales",
        "1 of 64",
    ),
    "scale nan": (
        set_at(f"{DOWN1}.scales", (3, 3), np.nan),
        "NONFINITE",
        f"{DOWN1}.scales",
        "1 of 256",
    ),
    "scale beyond": (
        swap(f"{Q0}.scales", lambda a: a.astype(np.float32) * 1e7),
        "SCALES",
        f"{Q0}.scales",
        "64 of 64 scales are beyond",
    ),
    "kept by rule": (
        put("dynamic", {"-:.*k_proj": {}}),
        "RULES",
        MODULES[1],
        "rule '-:.*k_proj' excludes it",
    ),
    "not listed": (
        put("modules_in_block_to_quantize", [["q_proj", "k_proj"]]),
        "RULES",
        MODULES[2],
        "does not name it",
    ),
    "listed in vain": (
        put("modules_in_block_to_quantize", [["q_proj", "k_proj", "down_proj", "up_proj"]]),
        "RULES",
        "up_proj",
        "no quantized module has that name",
    ),
    "plain and packed": (both_forms, "RULES", f"{Q0}.weight", "beside its packed form"),
    "plain without a rule": (
        lambda files: unpack(files, MODULES[4]),
        "RULES",
        f"{MODULES[4]}.weight",
        "no rule excludes it",
    ),
    "nothing packed": (no_codes, "RULES", None, "no tensor is quantized"),
    "head only in the config": (
        put("lm_head", True),
        "RULES",
        "lm_head",
        "there is no lm_head.qweight",
    ),
    "head not in the config": (unused_head, "RULES", "lm_head", "lm_head is not true"),
    "head tied": (tied_head, "RULES", "lm_head", "use the embeddings in its place"),
}


@pytest.mark.parametrize("plant", PLANTED)
def test_a_planted_defect_is_found_at_its_tensor(plant: str, tmp_path: Path) -> None:
    change, kind, tensor, message = PLANTED[plant]
    code = f"E_CKPT_{kind}"
    files = gptq_files()
    change(files)
    found = defects(files.write(tmp_path / "c"))
    assert {defect.code for defect in found} == {code}
    at_tensor = [defect for defect in found if defect.tensor == tensor]
    assert at_tensor
    assert any(message in defect.message for defect in at_tensor)


@pytest.mark.parametrize("format", ["gptq", "gptq_v2"])
@pytest.mark.parametrize(
    ("code", "scale", "beyond"), [(0, 9000, 8), (1, 9000, 0), (15, -9000, 0), (15, 9360, 8)]
)
def test_verify_counts_the_weights_beyond_float16(
    code: int, scale: float, beyond: int, format: str, tmp_path: Path
) -> None:
    files = gptq_files(format=format)  # symmetric with 4 bits: a code stands for scale * (code - 8)
    # eight words hold the 64 columns of an output; the last four words hold group 1
    files.tensors[f"{Q0}.qweight"][4:, 3] = words([8] * 32, 4)
    files.tensors[f"{Q0}.qweight"][5, 3] = words([code] * 8, 4)[0]
    files.tensors[f"{Q0}.scales"][1, 3] = scale
    found = [str(defect) for defect in defects(files.write(tmp_path / "c"))]
    place = f"E_CKPT_NONFINITE {SHARDS[0]}: {Q0}.qweight"
    if beyond:
        assert found == [f"{place}: {beyond} of its weights are beyond float16"]
    else:
        assert found == []


@pytest.mark.parametrize("size", [2.0**-24, 2.0**-20, 2.0**-15])
def test_subnormal_scales_are_no_defect(size: float, tmp_path: Path) -> None:
    files = gptq_files()
    files.tensors[f"{Q0}.scales"][:] = size
    files.tensors[f"{DOWN1}.scales"][1] = -size
    assert not defects(files.write(tmp_path / "c"))


EFFECTS = {
    "form": [
        "only in quantize_config",
        "in text_config",
        "no method",
        "upper case",
        "v2 by one key",
        "two formats",
        "adapter",
        "other weights",
    ],
    "readers": ["kept by rule", "not listed", "listed in vain", "plain without a rule"],
    "numbers": [
        "mislabelled v2",
        "wrapped zero",
        "one odd zero",
        "all in one group",
        "no sym",
        "no scales",
    ],
}


@pytest.mark.parametrize(
    ("effect", "plant"), [(effect, plant) for effect in EFFECTS for plant in EFFECTS[effect]]
)
def test_a_defect_has_an_effect_and_a_hint(effect: str, plant: str, tmp_path: Path) -> None:
    files = gptq_files()
    PLANTED[plant][0](files)
    found = defects(files.write(tmp_path / "c"))
    assert {defect.effect for defect in found} == {effect}
    if plant != "no scales":
        assert all(defect.hint for defect in found)


def test_two_formats_change_only_the_form_of_symmetric_weights(tmp_path: Path) -> None:
    files = gptq_files()
    two_formats(files)
    (found,) = defects(files.write(tmp_path / "c"))
    assert found.effect == "form"


def test_two_formats_change_the_numbers_of_asymmetric_weights(tmp_path: Path) -> None:
    files = gptq_files(sym=False)
    two_formats(files)
    (found,) = defects(files.write(tmp_path / "c"))
    assert found.effect == "numbers"
    assert found.hint == (
        "set checkpoint_format and format to the one that is meant "
        "in config.json and quantize_config.json"
    )


@pytest.mark.parametrize(("desc_act", "effect"), [(False, "form"), (True, "numbers")])
def test_a_missing_g_idx_changes_numbers_only_if_out_of_order(
    desc_act: bool, effect: str, tmp_path: Path
) -> None:
    files = gptq_files(desc_act=desc_act)
    del files.tensors[f"{Q0}.g_idx"]
    (found,) = defects(files.write(tmp_path / "c"))
    assert (found.code, found.tensor, found.effect) == ("E_CKPT_INCOMPLETE", Q0, effect)


def test_zero_points_are_checked_without_a_g_idx(tmp_path: Path) -> None:
    files = gptq_files()
    files.tensors[f"{Q0}.qzeros"] += 0x11111111
    del files.tensors[f"{Q0}.g_idx"]
    found = defects(files.write(tmp_path / "c"))
    assert [(defect.code, defect.effect) for defect in found] == [
        ("E_CKPT_INCOMPLETE", "form"),
        ("E_CKPT_ZEROS", "numbers"),
    ]


def test_shapes_are_checked_without_a_g_idx(tmp_path: Path) -> None:
    files = gptq_files()
    del files.tensors[f"{Q0}.g_idx"]
    files.tensors[f"{Q0}.scales"] = files.tensors[f"{Q0}.scales"][:1].copy()
    found = defects(files.write(tmp_path / "c"))
    assert [(defect.code, defect.tensor) for defect in found] == [
        ("E_CKPT_INCOMPLETE", Q0),
        ("E_CKPT_SHAPE", f"{Q0}.scales"),
    ]


def test_a_defect_names_only_the_planted_module(tmp_path: Path) -> None:
    files = gptq_files()
    files.tensors[f"{DOWN1}.scales"][2, 5] = 0
    (found,) = defects(files.write(tmp_path / "c"))
    expected = f"E_CKPT_SCALES {SHARDS[1]}: {DOWN1}.scales: 1 of 256 scales are zero in float16"
    assert str(found) == expected


@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "model.layers.1.norm.weight", "lm_head.weight"]
)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_full_verify_finds_kept_tensors_that_are_not_finite(
    name: str, value: float, tmp_path: Path
) -> None:
    files = gptq_files()
    files.tensors[name].flat[[0, -1]] = value
    directory = files.write(tmp_path / "c")
    assert defects(directory) == []
    (found,) = defects(directory, full=True)
    assert (found.code, found.tensor) == ("E_CKPT_NONFINITE", name)
    assert found.message == "holds NaN or infinity, 2 times"


def test_full_verify_checks_the_numbers_of_every_chunk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gptq_cli.checkpoint.headers.CHUNK_BYTES", 64)
    files = gptq_files()
    files.tensors["lm_head.weight"].flat[[5, 700, -1]] = np.nan
    (found,) = defects(files.write(tmp_path / "c"), full=True)
    assert found.message == "holds NaN or infinity, 3 times"


def test_full_verify_finds_codes_that_are_all_zero(tmp_path: Path) -> None:
    files = gptq_files()
    files.tensors[f"{DOWN1}.qweight"][:] = 0
    (found,) = defects(files.write(tmp_path / "c"), full=True)
    assert (found.code, found.tensor) == ("E_CKPT_CORRUPT", f"{DOWN1}.qweight")


def test_full_verify_reads_bfloat16(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file as load_torch
    from safetensors.torch import save_file as save_torch

    directory = gptq_files().write(tmp_path / "c")
    shard = directory / SHARDS[0]
    tensors = load_torch(shard)
    scales = tensors[f"{Q0}.scales"].bfloat16()
    norm = torch.ones(HIDDEN, dtype=torch.bfloat16)
    changed = {f"{Q0}.scales": scales, "model.layers.0.norm.weight": norm}
    save_torch(tensors | changed, shard, metadata={"format": "pt"})
    assert defects(directory, full=True) == []
    scales[1, 7] = float("inf")
    norm[9] = float("nan")
    save_torch(tensors | changed, shard, metadata={"format": "pt"})
    assert {defect.tensor for defect in defects(directory, full=True)} == set(changed)


def test_every_torn_file_is_a_defect(tmp_path: Path) -> None:
    directory = gptq_files().write(tmp_path / "c")
    for shard in SHARDS:
        (directory / shard).write_bytes((directory / shard).read_bytes()[:-1])
    found = defects(directory)
    assert [defect.code for defect in found] == ["E_CKPT_CORRUPT"] * 2
    assert all(shard in defect.message for shard, defect in zip(SHARDS, found, strict=True))
    assert {defect.hint for defect in found} == {"download or copy the file again"}


def test_a_missing_shard_hides_a_torn_one(tmp_path: Path) -> None:
    directory = gptq_files().write(tmp_path / "c")
    (directory / SHARDS[0]).write_bytes((directory / SHARDS[0]).read_bytes()[:-1])
    (directory / SHARDS[1]).unlink()
    assert [defect.code for defect in defects(directory)] == ["E_CKPT_MISSING"]


def test_shards_of_two_revisions_are_a_defect(tmp_path: Path) -> None:
    directory = gptq_files().write(tmp_path / "c")
    tensors = load_file(directory / SHARDS[1])
    tensors["model.layers.1.norm2.weight"] = tensors.pop("model.layers.1.norm.weight")
    save_file(tensors, directory / SHARDS[1])
    index = directory / "model.safetensors.index.json"
    assert [(defect.code, defect.message) for defect in defects(directory)] == [
        ("E_CKPT_INDEX", f"`{index}` lists `model.layers.1.norm.weight`, which no shard holds"),
        (
            "E_CKPT_INDEX",
            f"`{index}` does not list `model.layers.1.norm2.weight`, which its shards hold",
        ),
    ]


def test_a_torn_quantize_config_is_a_defect(tmp_path: Path) -> None:
    directory = gptq_files().write(tmp_path / "c")
    (directory / "quantize_config.json").write_bytes(b'{"bits": 4, \xb1')
    (found,) = defects(directory)
    assert found.code == "E_CKPT_CONFIG"
    assert "quantize_config.json` cannot be read as JSON" in found.message


def test_a_checkpoint_that_is_not_quantized_is_refused(tmp_path: Path) -> None:
    files = gptq_files()
    no_codes(files)
    del files.config["quantization_config"]
    with pytest.raises(InputError, match="is not quantized") as caught:
        verify_checkpoint(files.write(tmp_path / "plain"))
    assert (caught.value.code, caught.value.exit_code) == ("E_CKPT_KIND", 3)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("quant_method", "awq", "packed by AWQ in another way"),
        ("checkpoint_format", "marlin", "not read here"),
        ("pack_dtype", "int16", "not read here"),
    ],
)
def test_a_checkpoint_of_another_method_is_refused(
    key: str, value: str, words: str, tmp_path: Path
) -> None:
    files = gptq_files()
    files.quantization[key] = value
    with pytest.raises(InputError, match=words) as caught:
        verify_checkpoint(files.write(tmp_path / "c"))
    assert caught.value.code == "E_CKPT_QUANTIZED"


def test_verifying_needs_no_torch(tmp_path: Path) -> None:
    directory = gptq_files().write(tmp_path / "c")
    script = f"""
import sys
from pathlib import Path
from gptq_cli.checkpoint.verify import verify_checkpoint
verify_checkpoint(Path({str(directory)!r}), full=True)
print(sorted({{"torch", "transformers", "safetensors"}} & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"
