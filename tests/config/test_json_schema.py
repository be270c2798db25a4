"""The JSON Schema and the program accept the same configurations."""

from __future__ import annotations

import importlib.util
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft7Validator

from gptq_cli.config.json_schema import config_schema
from gptq_cli.config.resolve import FOLDER, load_config, recipes
from gptq_cli.config.schema import QuantizeConfig
from gptq_cli.errors import ConfigError

# Values of each field, some of which the program refuses. The schema decides about a regular
# expression by `format`, which checkers of other languages apply in other ways.
VALUES: dict[str, list[Any]] = {
    "bits": [2, 3, 4, 5, 7, 8, 3.5, 1, 9, 9.5, 1.5, "4", True, None],
    "group_size": [128, 32, 48, -1, 0, -2, "auto", "all", 64.5, None],
    "sym": [True, False, 1, "yes", None],
    "desc_act": [True, False, None],
    "act_group_aware": [True, False, None],
    "static_groups": [True, False, None],
    "signed_scales": [True, False, None],
    "limit_massive_tokens": [True, False, None],
    "scale_search": ["none", "mse", "best", None],
    "refine_sweeps": [0, 4, -1, "4", None],
    "asymmetric_calibration": [0, 0.75, 1, 1.5, -0.1, "auto", "half", "0.5", None],
    "loss_aware": [True, False, 1, None],
    "damp_mode": ["mean", "diagonal", "median", None],
    "damp_percent": [0.01, 0.5, 0, 1, -0.1, "0.1", None],
    "modules_in_block_to_quantize": [[["a"]], [["a"], ["b", "c"]], [], [[]], [[""]], "a", None],
    "dynamic": [
        {},
        {"-:a": {}},
        {"-:a": {"bits": 8}},
        {"+:a": {"bits": 8}},
        {"+:*.mlp": {"bits": 8}},
        {"?": {"bits": 8}},
        {"a": {"bits": 5}},
        {"a": {"bits": 9}},
        {"+:a": {"bits": 8, "bit": 4}},
        {"+:a": {"desc_act": True, "act_group_aware": True}},
        {"+:a": {"act_group_aware": True}},
        {"+:a": {"signed_scales": True}, "-:b": {}},
        {"+:a": {"signed_scales": True, "sym": True}},
        {"+:a": {"signed_scales": True, "sym": False}},
        {"+:a": {"group_size": 0}},
        {"+:a": {"damp_percent": 1}},
        ["a"],
        None,
    ],
    "unfit": ["error", "keep", "skip", None],
    "target_size": ["4GB", "500 MiB", "1.5tb", "4 gigabytes", "-4GB", 0, 10**9, None],
    "target_kl": [0.02, 0, -1, None],
    "allow_bits": [[2, 4], [4, 4], [4], [], [3, 8, 3], [4, 7], [4, 9], "2,4", None],
    "protect": ["a", None],
    "lm_head": [True, False, "true", None],
    "lora": ["a", ["a", "b"], ["none", "b"], ["none"], [], "", [""], None],
    "allow_requantize": [True, None],
    "target": ["vllm", "vllm/cpu", "any", "vllm/tpu", "any/cpu", "VLLM", "x", None],
    "moe_uncovered": ["error", "rtn", "all-tokens", "drop", None],
    "on_numeric_fault": ["error", "rtn", "skip", None],
    "max_fallbacks": [0, 3, -1, None],
    "dataset": ["c4", ["a", "b"], [], "", 4, None],
    "dataset_config": ["en", "", None],
    "text_column": ["text", ["a", "b"], [], "", None],
    "pack": [True, False, None],
    "seqlen": [64, 0, -1, "64", None],
    "nsamples": [4, 256, 0, None],
    "batch_size": [1, 8, 200, 0, None],
    "seed": [0, 7, -1, 2**63, None],
    "format": ["gptq", "gptq_v2", "compressed-tensors", "mlx", "auto-round", "awq", None],
    "max_shard_size": ["5GB", "0GB", "5XB", 7, 0, None],
    "max_ram": ["64GB", 10**9, "", None],
    "backend": ["auto", "triton", "cuda", None],
    "device": ["auto", "cpu", "cuda", "cuda:3", "gpu", "cuda:", None],
    "dtype": ["auto", "float32", "fp32", None],
    "trust_remote_code": [True, False, None],
    "preset": ["gptq", "fast", "best", "slow", None],
    "group_sise": [128],
}
COUPLED = [
    ["bits", "group_size", "format", "desc_act", "static_groups", "allow_bits", "target_kl"],
    ["bits", "target_size", "target_kl", "allow_bits", "protect", "format", "preset"],
    ["sym", "signed_scales", "desc_act", "act_group_aware", "dynamic", "preset"],
    ["bits", "format", "dynamic", "group_size", "sym", "desc_act"],
    ["nsamples", "batch_size", "seqlen"],
]
validator = Draft7Validator(config_schema())


def test_the_schema_and_the_program_agree_about_each_value() -> None:
    tried = 0
    for field, values in VALUES.items():
        for value in values:
            check_agreement({field: value})
            tried += 1
    assert tried > 200
    named = set(VALUES) - {"group_sise"}
    alike = {"dataset_split", "chat_template", "max_vram", "true_sequential"}
    assert named | alike == set(QuantizeConfig.model_fields)


def test_the_schema_and_the_program_agree_about_conflicts() -> None:
    draw = random.Random(3)
    refused = 0
    for _ in range(600):
        fields = draw.choice(COUPLED)
        chosen = draw.sample(fields, draw.randint(2, min(4, len(fields))))
        values = {field: draw.choice(VALUES[field]) for field in chosen}
        refused += not check_agreement(values)
    assert 120 < refused < 540


def check_agreement(values: dict[str, Any]) -> bool:
    """Fail if the schema and the program judge differently; return whether they accept."""
    refused = refusal(values)
    problems = [error.message for error in validator.iter_errors(values)]
    if problems or refused is None or not only_the_program_knows(values, refused):
        assert bool(problems) == (refused is not None), (values, refused, problems)
    return not problems


def refusal(values: dict[str, Any]) -> ConfigError | None:
    try:
        QuantizeConfig.model_validate(values)
    except ConfigError as refused:
        return refused
    return None


def only_the_program_knows(values: dict[str, Any], refused: ConfigError) -> bool:
    """Return whether two numbers are compared, or a width that a rule sets beside an average."""
    if refused.code == "E_CFG_FORMAT" and str(refused).startswith("dynamic"):
        return values["bits"] == 3.5
    batch, samples = values.get("batch_size"), values.get("nsamples")
    return type(batch) is int and type(samples) is int and batch > samples


def test_recipes_and_defaults_fit_the_schema() -> None:
    for name, file in recipes().items():
        validator.validate(load_config(name).model_dump(mode="json"))
        assert file.parent == FOLDER
    whole = QuantizeConfig().model_dump(mode="json")
    validator.validate(whole)
    defaults = {name: field["default"] for name, field in config_schema()["properties"].items()}
    assert defaults == whole


def test_check_jsonschema_judges_files_by_the_shipped_schema(tmp_path: Path) -> None:
    if importlib.util.find_spec("check_jsonschema") is None:
        pytest.skip("check-jsonschema is not installed")
    good, wrong = tmp_path / "good.yaml", tmp_path / "wrong.yaml"
    good.write_text("bits: 3\ndynamic: {'-:(?i).*DOWN': {}, '+:.*q_proj': {bits: 8}}\n")
    wrong.write_text(
        "bits: 4\ndamp_percent: 2\nmax_ram: 4XB\ndesc_act: true\nact_group_aware: true\n"
        "dynamic: {'+:*.mlp': {bits: 8}}\n"
    )
    command = [sys.executable, "-m", "check_jsonschema", "--regex-variant", "python"]
    command += ["--schemafile", str(FOLDER / "gptq.schema.json")]
    passed = subprocess.run(
        [*command, good, *recipes().values()], capture_output=True, text=True, check=False
    )
    assert (passed.returncode, passed.stdout) == (0, "ok -- validation done\n"), passed.stdout
    failed = subprocess.run(
        [*command, wrong, "-o", "json"], capture_output=True, text=True, check=False
    )
    places = {error["path"] for error in json.loads(failed.stdout)["errors"]}
    assert (failed.returncode, places) == (1, {"$", "$.damp_percent", "$.max_ram", "$.dynamic"})


@pytest.mark.parametrize("file", sorted(Path(FOLDER).glob("*.schema.json")))
def test_the_shipped_schema_is_that_of_the_code(file: Path) -> None:
    assert json.loads(file.read_text(encoding="utf-8")) == config_schema(), "run: make schema"
