"""Precedence, origins, and every problem at once with its place and the name the user gave it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gptq_cli.config.resolve import Resolved, check_flags, resolve
from gptq_cli.errors import ConfigError, Location, Problem


def write(folder: Path, text: str, name: str = "c.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def problems_of(
    flags: dict[str, Any], env: dict[str, str], file: Path | None = None
) -> list[Problem]:
    with pytest.raises(ConfigError) as caught:
        resolve(flags, env, file)
    assert caught.value.exit_code == 2
    return list(caught.value.problems)


def messages_of(flags: dict[str, Any], env: dict[str, str], file: Path | None = None) -> list[str]:
    return [problem.message for problem in problems_of(flags, env, file)]


def test_precedence_is_flag_environment_file_preset_default(tmp_path: Path) -> None:
    file = write(tmp_path, "preset: act-order\nbits: 2\ngroup_size: 32\nseed: 3\n")
    found = resolve({"bits": 8, "sym": None}, {"GPTQ_BITS": "3", "GPTQ_GROUP_SIZE": "64"}, file)
    config, origins = found.config, found.origins
    values = (config.bits, config.group_size, config.seed, config.static_groups, config.sym)
    assert values == (8, 64, 3, True, True)
    fields = ("bits", "group_size", "seed", "static_groups", "sym")
    places = ["--bits", "GPTQ_GROUP_SIZE", f"{file}:4", "preset act-order", "default"]
    assert [origins[field] for field in fields] == places


def test_origin_of_a_derived_value_is_its_reason() -> None:
    found = resolve({"bits": 4, "desc_act": True, "sym": False, "nsamples": 2}, {})
    assert found.origins["act_group_aware"] == "because desc_act is true"
    assert found.origins["format"] == "because sym is false"
    assert (found.config.act_group_aware, found.config.format, found.config.batch_size) == (
        False,
        "gptq_v2",
        2,
    )


def test_a_later_source_replaces_dynamic_whole(tmp_path: Path) -> None:
    file = write(tmp_path, "bits: 4\ndynamic: {'-:a': {}, b: {bits: 8}}\n")
    assert resolve({"dynamic": {"-:c": {}}}, {}, file).config.dynamic == {"-:c": {}}
    assert resolve({}, {"GPTQ_DYNAMIC": "{b: {bits: 2}}"}, file).config.dynamic == {
        "b": {"bits": 2}
    }


def test_empty_variables_and_nulls_set_nothing(tmp_path: Path) -> None:
    file = write(tmp_path, "bits: 4\ngroup_size: null\nseed:\n")
    assert resolve({}, {"GPTQ_BITS": "", "GPTQ_SEED": ""}, file) == Resolved(
        config=resolve({"bits": 4}, {}).config,
        origins={**resolve({"bits": 4}, {}).origins, "bits": f"{file}:1"},
        notes=(),
    )


def test_all_problems_of_a_file_are_reported_in_order(tmp_path: Path) -> None:
    text = """\
bits: 9
group_sise: 3
nsamples: "128"
sym: yes
sym: no
damp_percent: .nan
group_size: 0
seqlen: 1.5
desc_act: true
act_group_aware: true
dataset: [a, 2]
format: gptqv2
modules_in_block_to_quantize: [q_proj]
max_shard_size: 5 parsecs
dynamic:
  "-:lm_head": {bits: 4}
  '+:.*(down': {bitz: 3, group_size: 0}
  '+:up': 4
"""
    file = write(tmp_path, text)
    found = []
    for problem in problems_of({}, {}, file):
        assert problem.location is not None
        line, column = problem.location.line, problem.location.column
        found.append((problem.code, line, column, problem.message, problem.hint))
    bits = "2, 3, 4, 5, 6, 7 or 8, or an average such as 3.5"
    sizes = "a positive number of columns, -1 for one group per row, or auto, got 0"
    datasets = "must be a dataset name, a path, or a list of these"
    modules = "must be a list of lists of module names, like [[self_attn.q_proj], [mlp.down_proj]]"
    assert found == [
        ("E_CFG_RANGE", 1, 7, f"bits must be {bits}, got 9",
         "8 bits are the most; a rule `-:NAME` of dynamic keeps a layer as it is"),
        ("E_CFG_UNKNOWN_KEY", 2, 1, "group_sise is not a known key", "did you mean group_size?"),
        ("E_CFG_TYPE", 3, 11, 'nsamples must be a whole number of 1 or more, got "128"',
         "write 128 without quotes"),
        ("E_CFG_TYPE", 4, 6, 'sym must be true or false, got "yes"', "write true, without quotes"),
        ("E_CFG_YAML", 5, 1, f"sym is given twice, first in {file}:4:1", "keep one of them"),
        ("E_CFG_RANGE", 6, 15, "damp_percent must be a number strictly between 0 and 1, got .nan",
         "typical values are 0.01 to 0.1"),
        ("E_CFG_RANGE", 7, 13, f"group_size must be {sizes}", "write -1 for one group per row"),
        ("E_CFG_TYPE", 8, 9, "seqlen must be a whole number of 1 or more, got 1.5",
         "the default is 2048"),
        ("E_CFG_CONFLICT", 9, 11,
         f"desc_act ({file}:9:11) and act_group_aware ({file}:10:18) are both true "
         "and exclude each other",
         "set act_group_aware to false, or remove it: desc_act turns it off"),
        ("E_CFG_TYPE", 11, 14, f"dataset[1] {datasets}, got 2 as item 2", None),
        ("E_CFG_RANGE", 12, 9,
         'format must be gptq, gptq_v2, compressed-tensors, mlx or auto-round, got "gptqv2"',
         "did you mean gptq_v2?"),
        ("E_CFG_TYPE", 13, 32,
         f'modules_in_block_to_quantize[0] {modules}, got "q_proj" as item 1', None),
        ("E_CFG_RANGE", 14, 17,
         "max_shard_size must be a size such as 5GB or 500MiB, or a number of bytes, "
         'got "5 parsecs"', None),
        ("E_CFG_CONFLICT", 16, 16,
         "dynamic['-:lm_head'] keeps its layers in full precision and takes no settings",
         "write {}, or use '+:lm_head' to quantize the layer with other settings"),
        ("E_CFG_REGEX", 17, 3,
         "dynamic['+:.*(down'] is not a regular expression: "
         "missing ), unterminated subpattern at position 2",
         "rules are regular expressions: write \\. for a dot and .* for anything"),
        ("E_CFG_UNKNOWN_KEY", 17, 17, "dynamic['+:.*(down'].bitz is not a known key",
         "did you mean bits?"),
        ("E_CFG_RANGE", 17, 38, f"dynamic['+:.*(down'].group_size must be {sizes}",
         "write -1 for one group per row"),
        ("E_CFG_TYPE", 18, 11,
         "dynamic['+:up'] must be a mapping of settings such as {bits: 8}, got 4", None),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("line", "code", "words"),
    [
        ("bits: 0", "E_CFG_RANGE", "got 0"),
        ("bits: 1.5", "E_CFG_RANGE", "got 1.5"),
        ("bits: '4'", "E_CFG_TYPE", 'got "4"'),
        ("bits: true", "E_CFG_TYPE", "got true"),
        ("group_size: -2", "E_CFG_RANGE", "got -2"),
        ("group_size: 64.0", "E_CFG_TYPE", "got 64.0"),
        ("damp_percent: 0", "E_CFG_RANGE", "got 0"),
        ("damp_percent: 1", "E_CFG_RANGE", "got 1"),
        ("damp_percent: -0.1", "E_CFG_RANGE", "got -0.1"),
        ("damp_percent: .inf", "E_CFG_RANGE", "got .inf"),
        ("damp_percent: '0.1'", "E_CFG_TYPE", 'got "0.1"'),
        ("sym: 1", "E_CFG_TYPE", "got 1"),
        ("signed_scales: 'true'", "E_CFG_TYPE", 'got "true"'),
        ("scale_search: activation", "E_CFG_RANGE", 'must be none or mse, got "activation"'),
        ("scale_search: false", "E_CFG_TYPE", "got false"),
        (
            "asymmetric_calibration: 2",
            "E_CFG_RANGE",
            "must be a number from 0 to 1, or auto, got 2",
        ),
        ("asymmetric_calibration: aut", "E_CFG_TYPE", 'got "aut"'),
        ("group_size: aut", "E_CFG_TYPE", 'got "aut"'),
        ("max_fallbacks: -1", "E_CFG_RANGE", "got -1"),
        ("max_fallbacks: x", "E_CFG_TYPE", 'got "x"'),
        ("refine_sweeps: -1", "E_CFG_RANGE", "must be a whole number of 0 or more, got -1"),
        ("refine_sweeps: 1.5", "E_CFG_TYPE", "got 1.5"),
        ("damp_mode: diag", "E_CFG_RANGE", 'must be mean or diagonal, got "diag"'),
        ("sym: 'yes'", "E_CFG_TYPE", 'got "yes"'),
        ("desc_act: no", "E_CFG_TYPE", 'got "no"'),
        ("nsamples: 0", "E_CFG_RANGE", "got 0"),
        ("seed: -1", "E_CFG_RANGE", "got -1"),
        ("batch_size: 200", "E_CFG_RANGE", "a batch of 200 from 128 samples"),
        ("device: gpu", "E_CFG_RANGE", 'got "gpu"'),
        ("device: 0", "E_CFG_TYPE", "got 0"),
        ("dtype: fp16", "E_CFG_RANGE", 'got "fp16"'),
        ("backend: marlin", "E_CFG_RANGE", 'got "marlin"'),
        ("dataset: []", "E_CFG_RANGE", "got []"),
        ("dataset: 3", "E_CFG_TYPE", "got 3"),
        ("text_column: ''", "E_CFG_RANGE", 'got ""'),
        ("dataset_config: 3", "E_CFG_TYPE", "dataset_config must be a name or null, got 3"),
        ("modules_in_block_to_quantize: [[]]", "E_CFG_RANGE", "got [] as item 1"),
        ("dynamic: [1]", "E_CFG_TYPE", "got [1]"),
        ("dynamic: {'-:(': {}}", "E_CFG_REGEX", "is not a regular expression"),
        ("preset: act_order", "E_CFG_RANGE", 'got "act_order"'),
        ("preset: [1]", "E_CFG_TYPE", "got [1]"),
        ("BITS: 4", "E_CFG_UNKNOWN_KEY", "BITS is not a known key"),
        ("wbits: null", "E_CFG_UNKNOWN_KEY", "wbits is not a known key"),
        ("quant_method: awq", "E_CFG_RANGE", 'quant_method must be gptq, got "awq"'),
    ],
)
def test_a_wrong_value_gives_one_problem_that_names_it(
    line: str, code: str, words: str, tmp_path: Path
) -> None:
    text = line if line.startswith("bits") else f"bits: 4\n{line}"
    (problem,) = problems_of({}, {}, write(tmp_path, text))
    assert problem.code == code
    assert words in problem.message
    assert problem.location
    assert problem.location.line == text.count("\n") + 1


@pytest.mark.parametrize(
    "key", ["group_sise", "group-size", "Groupsize", "percdamp", "act_order", "n_samples", "wbits"]
)
def test_hint_for_an_unknown_key_names_a_similar_key(key: str, tmp_path: Path) -> None:
    meant = {
        "percdamp": "damp_percent",
        "act_order": "desc_act",
        "n_samples": "nsamples",
        "wbits": "bits",
    }
    (problem,) = problems_of({}, {}, write(tmp_path, f"bits: 4\n{key}: 1"))
    assert problem.hint == f"did you mean {meant.get(key, 'group_size')}?"


@pytest.mark.parametrize(
    ("flags", "hint"),
    [
        ({"device": "1"}, "did you mean cuda:1?"),
        ({"device": 1}, "did you mean cuda:1?"),
        ({"device": "cpu:0"}, "did you mean cpu?"),
        ({"device": "gpu"}, "did you mean cuda?"),
        ({"preset": "4"}, None),  # which takes no numbers
        ({"seqlen": "128"}, "write 128 without quotes"),
        ({"group_size": "64"}, "write 64 without quotes"),
    ],
)
def test_the_hint_for_a_number_fits_what_the_field_takes(
    flags: dict[str, Any], hint: str | None
) -> None:
    (problem,) = problems_of(flags, {})
    assert problem.hint == hint


def test_without_a_width_there_are_four_bits(tmp_path: Path) -> None:
    for found in (resolve({}, {}, write(tmp_path, "sym: true\n")), resolve({}, {})):
        assert (found.config.bits, found.origins["bits"]) == (4, "default")
    assert resolve({}, {}, bits=8).config.bits == 8
    assert resolve({"bits": 3}, {}, bits=8).config.bits == 3


def test_errors_name_the_flag_or_the_variable() -> None:
    flags = {"bits": 9, "damp_percent": 2.0, "desc_act": True, "dynamic": {"+:(": {"bits": 9}}}
    env = {"GPTQ_SYM": "no", "GPTQ_ACT_GROUP_AWARE": "true", "GPTQ_SEQLEN": "many"}
    assert messages_of(flags, env) == [
        "--bits must be 2, 3, 4, 5, 6, 7 or 8, or an average such as 3.5, got 9",
        "--damp-percent must be a number strictly between 0 and 1, got 2.0",
        "--dynamic['+:('] is not a regular expression: "
        "missing ), unterminated subpattern at position 0",
        "--dynamic['+:('].bits must be 2, 3, 4, 5, 6, 7 or 8, got 9",
        'GPTQ_SYM must be true or false, got "no"',
        'GPTQ_SEQLEN must be a whole number of 1 or more, got "many"',
        "--desc-act and GPTQ_ACT_GROUP_AWARE are both true and exclude each other",
    ]


def test_a_conflict_names_both_sources(tmp_path: Path) -> None:
    file = write(tmp_path, "bits: 4\nact_group_aware: true\n")
    words = f"--desc-act and act_group_aware ({file}:2:18) are both true and exclude each other"
    assert messages_of({"desc_act": True}, {}, file) == [words]
    words = "--batch-size and nsamples (default) disagree: a batch of 300 from 128 samples"
    assert messages_of({"bits": 4, "batch_size": 300}, {}) == [words]


def test_hints_about_conflicts_name_the_flags_that_were_given(tmp_path: Path) -> None:
    file = write(tmp_path, "bits: 4\nact_group_aware: true\nnsamples: 4\n")
    end = "desc_act turns it off"
    (of_file,) = problems_of({"desc_act": True}, {}, file)
    assert of_file.hint == f"set act_group_aware to false, or remove it: {end}"
    (of_flag,) = problems_of({"desc_act": True, "act_group_aware": True}, {})
    assert of_flag.hint == f"use --no-act-group-aware, or leave out --act-group-aware: {end}"
    file.write_text("nsamples: 4\n")
    (of_batch,) = problems_of({"batch_size": 8}, {}, file)
    assert of_batch.hint == "use --batch-size 4 or less"


def test_a_wrong_value_under_a_flag_is_still_an_error(tmp_path: Path) -> None:
    assert messages_of({"bits": 4}, {}, write(tmp_path, "bits: 9\n")) == [
        "bits must be 2, 3, 4, 5, 6, 7 or 8, or an average such as 3.5, got 9"
    ]


def test_a_misspelt_variable_is_an_error() -> None:
    (problem,) = problems_of({"bits": 4}, {"GPTQ_GROUPSIZE": "64"})
    assert problem.code == "E_CFG_UNKNOWN_KEY"
    assert problem.message == "GPTQ_GROUPSIZE sets no known field"
    assert problem.hint == "did you mean GPTQ_GROUP_SIZE?"


def test_a_variable_of_another_tool_gives_a_note() -> None:
    variables = {"GPTQ_HOME": "/x", "GPTQMODEL_X": "1", "gptq_bits": "9"}
    notes = resolve({"bits": 4}, variables).notes
    assert notes == ("GPTQ_HOME is not a setting of this tool and has no effect",)


def test_check_flags_names_each_wrong_flag() -> None:
    check_flags({"seqlen": 128, "device": "cpu", "model": 3, "bits": None})
    with pytest.raises(ConfigError) as caught:
        check_flags({"seqlen": 0, "device": "gpu"})
    assert [problem.message for problem in caught.value.problems] == [
        "--seqlen must be a whole number of 1 or more, got 0",
        '--device must be auto, cpu, cuda or cuda:N, got "gpu"',
    ]


def test_signed_scales_conflict_with_an_asymmetric_grid(tmp_path: Path) -> None:
    file = write(
        tmp_path, "bits: 4\nsym: false\ndynamic: {a: {signed_scales: true}, b: {sym: false}}\n"
    )
    (problem,) = problems_of({}, {}, file)
    assert (problem.code, problem.location) == ("E_CFG_CONFLICT", Location(str(file), 3, 30))
    assert problem.message == (
        f"dynamic.a.signed_scales ({file}:3:30) and sym ({file}:2:6) conflict: "
        "signed scales need a symmetric grid, but sym is false"
    )
    hint = "set signed_scales to false, or remove it: an asymmetric grid has no larger end"
    assert problem.hint == hint


def test_flags_signed_scales_and_asym_conflict() -> None:
    (problem,) = problems_of({"bits": 4, "sym": False, "signed_scales": True}, {})
    assert problem.message.startswith(
        "--signed-scales and --sym conflict: signed scales need a symmetric grid"
    )


def test_asym_turns_off_the_signed_scales_of_a_preset() -> None:
    found = resolve({"bits": 4, "sym": False, "preset": "balanced"}, {})
    assert found.config.signed_scales is False
    assert found.origins["signed_scales"] == "because sym is false"
    assert found.origins["damp_mode"] == "preset balanced"
