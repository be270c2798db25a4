"""The dicts that Optimum, transformers and other tools write are valid input, with notes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gptq_cli.config.resolve import Resolved, resolve, resolve_arguments
from gptq_cli.config.schema import QuantizeConfig
from gptq_cli.errors import ConfigError

# GPTQQuantizer(bits=4, dataset="c4", desc_act=True, act_group_aware=False, ...).to_dict()
# of optimum 2.3
OPTIMUM = {
    "bits": 4,
    "dataset": "c4",
    "group_size": 64,
    "damp_percent": 0.05,
    "desc_act": True,
    "act_group_aware": False,
    "sym": False,
    "true_sequential": False,
    "quant_method": "gptq",
    "modules_in_block_to_quantize": [["self_attn.q_proj"], ["mlp.down_proj"]],
    "format": "gptq",
    "meta": {"quantizer": ["optimum:2.3.0", "gptqmodel:7.7.0"]},
}


def resolved(values: dict[str, Any], folder: Path) -> Resolved:
    path = folder / "c.json"
    path.write_text(json.dumps(values, indent=1), encoding="utf-8")
    return resolve({}, {}, path)


def test_optimum_dict_sets_every_field(tmp_path: Path) -> None:
    found = resolved(OPTIMUM, tmp_path)
    ours = {key: value for key, value in OPTIMUM.items() if key not in ("quant_method", "meta")}
    assert found.config == QuantizeConfig(**ours)
    assert found.notes == ("meta has no effect: it names the tool that wrote the dict",)


@pytest.mark.parametrize(
    "given", [{}, {"desc_act": True, "dataset": ["a", "b"], "model_seqlen": 512, "sym": False}]
)
def test_transformers_dict_sets_every_field(given: dict[str, Any], tmp_path: Path) -> None:
    from transformers import GPTQConfig

    found = resolved(GPTQConfig(bits=4, **given).to_dict(), tmp_path)
    ours = dict(given)
    if "model_seqlen" in ours:
        ours["seqlen"] = ours.pop("model_seqlen")
    assert found.config == QuantizeConfig(
        bits=4, batch_size=1, backend="auto", format="gptq", damp_percent=0.1, **ours
    )
    assert found.notes == ()


# GPTQConfig(bits=4, ...).to_dict() of transformers 4.39, as in the config.json of
# Qwen2.5-Coder-1.5B-Instruct-GPTQ-Int4
TRANSFORMERS_4 = {
    "batch_size": 1, "bits": 4, "block_name_to_quantize": None, "cache_block_outputs": True,
    "damp_percent": 0.01, "dataset": None, "desc_act": False, "exllama_config": {"version": 1},
    "group_size": 128, "max_input_length": None, "model_seqlen": None,
    "module_name_preceding_first_block": None, "modules_in_block_to_quantize": None,
    "pad_token_id": None, "quant_method": "gptq", "sym": True, "tokenizer": None,
    "true_sequential": True, "use_cuda_fp16": False, "use_exllama": True,
}  # fmt: skip
# the same with the additions and changes of transformers 4.57
TRANSFORMERS_4_57 = {
    **TRANSFORMERS_4, "backend": "auto_trainable", "checkpoint_format": "gptq",
    "meta": {"quantizer": ["optimum:1.24.0", "gptqmodel:2.2.0"]},
}  # fmt: skip
# quantize_config.json of AutoGPTQ 0.6, and of the many checkpoints that were made with it
AUTOGPTQ = {
    "bits": 4, "group_size": 128, "damp_percent": 0.1, "desc_act": True, "static_groups": False,
    "sym": True, "true_sequential": True, "model_name_or_path": None,
    "model_file_base_name": "model", "is_marlin_format": False, "quant_method": "gptq",
}  # fmt: skip
# quantize_config.json of GPTQModel 0.9, 4 and 5.6
GPTQMODEL_0 = {
    "bits": 4, "dynamic": None, "group_size": 128, "damp_percent": 0.005, "true_sequential": True,
    "desc_act": True, "static_groups": False, "sym": True, "lm_head": False,
    "model_name_or_path": "", "model_file_base_name": "model", "quant_method": "gptq",
    "checkpoint_format": "gptq", "meta": {"quantizer": "gptqmodel:0.9.8"},
}  # fmt: skip
COMMON_TO_4_AND_5 = {
    "bits": 4, "group_size": 128, "desc_act": False, "sym": True, "lm_head": False,
    "quant_method": "gptq", "checkpoint_format": "gptq", "pack_dtype": "int32",
    "meta": {
        "quantizer": ["gptqmodel:4.0.0"], "uri": "https://github.com/modelcloud/gptqmodel",
        "damp_percent": 0.05, "damp_auto_increment": 0.01, "static_groups": False,
        "true_sequential": True, "mse": 0.0, "v2": False, "v2_alpha": 0.25,
    },
}  # fmt: skip
GPTQMODEL_4 = {**COMMON_TO_4_AND_5, "hyb_act": True}
GPTQMODEL_5 = {
    **COMMON_TO_4_AND_5,
    "method": "gptq", "format": "gptq", "pack_impl": "cpu", "damp_auto_increment": 0.01,
    "mse": 0.0, "v2": False, "v2_alpha": 0.25, "gptaq": None, "rotation": None, "adapter": None,
    "fail_safe": False, "act_group_aware": True, "mock_quantization": False,
    "hessian_chunk_size": None, "offload_to_disk": True, "offload_to_disk_path": "/tmp/x",
}  # fmt: skip
KERNELS = ("exllama_config", "use_cuda_fp16", "use_exllama")
NOTED_0 = ("model_name_or_path", "model_file_base_name", "meta")
NOTED_5 = (
    "meta", "pack_impl", "damp_auto_increment", "v2_alpha", "offload_to_disk",
    "offload_to_disk_path",
)  # fmt: skip


@pytest.mark.parametrize(
    ("values", "noted", "config"),
    [
        (TRANSFORMERS_4, KERNELS, {"damp_percent": 0.01, "batch_size": 1}),
        (TRANSFORMERS_4_57, (*KERNELS, "backend", "meta"), {"damp_percent": 0.01, "batch_size": 1}),
        (AUTOGPTQ, ("model_file_base_name",), {"damp_percent": 0.1, "desc_act": True}),
        (GPTQMODEL_0, NOTED_0, {"damp_percent": 0.005}),
        (GPTQMODEL_4, ("meta",), {"act_group_aware": True}),
        (GPTQMODEL_5, NOTED_5, {"act_group_aware": True}),
    ],
)
def test_dicts_of_older_tools_resolve_with_notes(
    values: dict[str, Any], noted: tuple[str, ...], config: dict[str, Any], tmp_path: Path
) -> None:
    found = resolved(values, tmp_path)
    fields = QuantizeConfig.model_fields
    given = {key: values[key] for key in values if key in fields and values[key] is not None}
    assert found.config == QuantizeConfig(**{**given, "backend": None, **config})
    assert [note.split()[0] for note in found.notes] == list(noted)
    assert all(" has no effect: " in note for note in found.notes)


# What `to_dict` of each library returned, with the defaults and with other values.
FOREIGN = json.loads(Path(__file__).with_name("foreign.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("tool", [name for name in FOREIGN if "marlin" not in name])
def test_dicts_that_the_libraries_wrote_are_configurations(tool: str, tmp_path: Path) -> None:
    values = FOREIGN[tool]
    found = resolved(values, tmp_path)
    for key, value in values.items():
        if key in QuantizeConfig.model_fields and value is not None:
            assert getattr(found.config, key) == value, key
    assert found.config.seqlen == (values.get("model_seqlen") or 2048)
    assert resolve_arguments(values, {}).config == found.config


def test_a_dict_for_the_layout_of_marlin_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is_marlin_format must be false, got true") as refused:
        resolved(FOREIGN["AutoGPTQ 0.7.1 marlin"], tmp_path)
    assert (refused.value.code, refused.value.exit_code) == ("E_CFG_RANGE", 2)


def test_note_names_the_settings_inside_meta(tmp_path: Path) -> None:
    (note,) = resolved(GPTQMODEL_4, tmp_path).notes
    assert note.endswith("give them yourself: damp_percent, static_groups, true_sequential")


def test_hyb_act_is_another_name_for_act_group_aware(tmp_path: Path) -> None:
    assert resolved({"bits": 4, "hyb_act": False}, tmp_path).config.act_group_aware is False
    with pytest.raises(ConfigError, match="hyb_act and act_group_aware mean the same but differ"):
        resolved({"bits": 4, "hyb_act": False, "act_group_aware": True}, tmp_path)


def test_format_and_seqlen_have_other_names(tmp_path: Path) -> None:
    found = resolved(
        {"bits": 4, "checkpoint_format": "gptq_v2", "format": None, "model_seqlen": 77}, tmp_path
    )
    assert (found.config.format, found.config.seqlen) == ("gptq_v2", 77)
    assert found.origins["seqlen"] == f"{tmp_path / 'c.json'}:5"
    assert (
        resolved({"bits": 4, "checkpoint_format": "gptq", "format": "gptq"}, tmp_path).config.format
        == "gptq"
    )


def test_notes_name_fields_without_effect_but_not_nulls(tmp_path: Path) -> None:
    without_note = {
        "meta": {},
        "pad_token_id": None,
        "cache_block_outputs": True,
        "tokenizer": None,
        "pack_dtype": "int32",
    }
    assert resolved({"bits": 4, **without_note}, tmp_path).notes == ()
    with_note = {
        "pad_token_id": 0,
        "cache_block_outputs": False,
        "max_input_length": 9,
        "module_name_preceding_first_block": ["x"],
    }
    notes = resolved({"bits": 4, **with_note}, tmp_path).notes
    assert [note.split()[0] for note in notes] == list(with_note)


@pytest.mark.parametrize(
    ("values", "message", "line"),
    [
        ({"quant_method": "awq"}, 'quant_method must be gptq, got "awq"', 3),
        ({"tokenizer": "gpt2"}, 'tokenizer must be left out, got "gpt2"', 3),
        ({"block_name_to_quantize": "h"}, 'block_name_to_quantize must be left out, got "h"', 3),
        ({"pack_dtype": "int8"}, 'pack_dtype must be int32, got "int8"', 3),
        ({"method": "qqq"}, 'method must be gptq, got "qqq"', 3),
        ({"is_marlin_format": True}, "is_marlin_format must be false, got true", 3),
        ({"mse": 2.4}, "mse must be 0, got 2.4", 3),
        ({"mse": True}, "mse must be 0, got true", 3),
        ({"v2": True}, "v2 must be false, got true", 3),
        ({"gptaq": {"alpha": 0.25}}, 'gptaq must be false, got {"alpha": 0.25}', 3),
        ({"rotation": "hadamard"}, 'rotation must be left out, got "hadamard"', 3),
        ({"adapter": {"rank": 8}}, 'adapter must be left out, got {"rank": 8}', 3),
        ({"fail_safe": True}, "fail_safe must be false, got true", 3),
        ({"mock_quantization": True}, "mock_quantization must be false, got true", 3),
        ({"backend": "marlin"}, 'backend must be auto, torch, triton or null, got "marlin"', 3),
        ({"backend": ["marlin"]}, 'backend must be auto, torch, triton or null, got ["marlin"]', 3),
        ({"backend": "unknown"}, 'backend must be auto, torch, triton or null, got "unknown"', 3),
        (
            {"checkpoint_format": "marlin"},
            "checkpoint_format must be gptq, gptq_v2, compressed-tensors, mlx or auto-round, "
            'got "marlin"',
            3,
        ),
        (
            {"checkpoint_format": "gptq", "format": "gptq_v2"},
            'checkpoint_format and format mean the same but differ: "gptq" and "gptq_v2"',
            3,
        ),
        ({"model_seqlen": 0}, "model_seqlen must be a whole number of 1 or more, got 0", 3),
        (
            {"model_seqlen": 5, "seqlen": 6},
            "model_seqlen and seqlen mean the same but differ: 5 and 6",
            3,
        ),
    ],
)
def test_unsupported_settings_are_refused_under_their_own_name(
    values: dict[str, Any], message: str, line: int, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        resolved({"bits": 4, **values}, tmp_path)
    (problem,) = caught.value.problems
    assert problem.message == message
    assert problem.location
    assert problem.location.line == line
