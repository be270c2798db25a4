"""Dicts that Optimum and transformers write are input as they are, and nothing in them is dropped in silence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gptq_cli.config.resolve import Resolved, resolve
from gptq_cli.config.schema import QuantizeConfig
from gptq_cli.errors import ConfigError

# GPTQQuantizer(bits=4, dataset="c4", desc_act=True, act_group_aware=False, ...).to_dict() of optimum 2.3
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


def test_optimum_dict_is_taken_field_by_field(tmp_path: Path) -> None:
    found = resolved(OPTIMUM, tmp_path)
    ours = {key: value for key, value in OPTIMUM.items() if key not in ("quant_method", "meta")}
    assert found.config == QuantizeConfig(**ours)
    assert found.notes == ("meta has no effect: it says which tool wrote the dict",)


@pytest.mark.parametrize("said", [{}, {"desc_act": True, "dataset": ["a", "b"], "model_seqlen": 512, "sym": False}])
def test_transformers_dict_is_taken_as_it_is(said: dict[str, Any], tmp_path: Path) -> None:
    from transformers import GPTQConfig

    found = resolved(GPTQConfig(bits=4, **said).to_dict(), tmp_path)
    ours = {"seqlen" if key == "model_seqlen" else key: value for key, value in said.items()}
    assert found.config == QuantizeConfig(bits=4, batch_size=1, backend="auto", format="gptq", damp_percent=0.1, **ours)
    assert found.notes == ()


def test_other_names_for_format_and_seqlen_are_known(tmp_path: Path) -> None:
    found = resolved({"bits": 4, "checkpoint_format": "gptq_v2", "format": None, "model_seqlen": 77}, tmp_path)
    assert (found.config.format, found.config.seqlen) == ("gptq_v2", 77)
    assert found.origins["seqlen"] == f"{tmp_path / 'c.json'}:5"
    assert resolved({"bits": 4, "checkpoint_format": "gptq", "format": "gptq"}, tmp_path).config.format == "gptq"


def test_fields_without_effect_are_noted_and_nulls_are_not(tmp_path: Path) -> None:
    silent = {"meta": {}, "pad_token_id": None, "cache_block_outputs": True, "tokenizer": None, "pack_dtype": "int32"}
    assert resolved({"bits": 4, **silent}, tmp_path).notes == ()
    loud = {
        "pad_token_id": 0,
        "cache_block_outputs": False,
        "max_input_length": 9,
        "module_name_preceding_first_block": ["x"],
    }
    notes = resolved({"bits": 4, **loud}, tmp_path).notes
    assert [note.split()[0] for note in notes] == list(loud)


@pytest.mark.parametrize(
    ("values", "message", "line"),
    [
        ({"quant_method": "awq"}, 'quant_method must be gptq, got "awq"', 3),
        ({"tokenizer": "gpt2"}, 'tokenizer must be left out, got "gpt2"', 3),
        ({"block_name_to_quantize": "h"}, 'block_name_to_quantize must be left out, got "h"', 3),
        ({"pack_dtype": "int8"}, 'pack_dtype must be int32, got "int8"', 3),
        ({"checkpoint_format": "marlin"}, 'checkpoint_format must be gptq or gptq_v2, got "marlin"', 3),
        (
            {"checkpoint_format": "gptq", "format": "gptq_v2"},
            'checkpoint_format and format mean the same and differ: "gptq" and "gptq_v2"',
            3,
        ),
        ({"model_seqlen": 0}, "model_seqlen must be a whole number of 1 or more, got 0", 3),
        ({"model_seqlen": 5, "seqlen": 6}, "model_seqlen and seqlen mean the same and differ: 5 and 6", 3),
    ],
)
def test_what_we_would_not_honour_is_refused_under_its_own_name(
    values: dict[str, Any], message: str, line: int, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        resolved({"bits": 4, **values}, tmp_path)
    (problem,) = caught.value.problems
    assert problem.message == message
    assert problem.location
    assert problem.location.line == line
