"""The rules in config.json tell vLLM, SGLang and GPTQModel what is stored, by their own names."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from gptq_cli.checkpoint.quantization_config import describe, skip_rules
from gptq_cli.checkpoint.source import open_checkpoint
from gptq_cli.config.schema import QuantizeConfig
from gptq_cli.config.serving import verdict_of
from gptq_cli.inspection.summary import inspect_checkpoint
from gptq_cli.planning.plan import plan_run
from gptq_cli.planning.run_plan import RunPlan, export_of_layers, remarks
from tests.families import DRAFTED, save_drafted

# What the engines fuse in these models. Sources: the models qwen3_5.py, deepseek_v2.py and
# glm4_moe.py of vllm 0.33.0 and of sglang 0.5.23.
FUSED = {
    "qkv_proj": ["q_proj", "k_proj", "v_proj"],
    "gate_up_proj": ["gate_proj", "up_proj"],
    "in_proj_qkvz": ["in_proj_qkv", "in_proj_z"],
    "in_proj_ba": ["in_proj_b", "in_proj_a"],
}
OF_VLLM = FUSED | {"fused_qkv_a_proj": ["q_a_proj", "kv_a_proj_with_mqa"]}
OF_SGLANG = FUSED | {"fused_qkv_a_proj_with_mqa": ["q_a_proj", "kv_a_proj_with_mqa"]}
ENGINES = [(OF_VLLM, "language_model.model."), (OF_SGLANG, "model.language_model.")]
Told = tuple[int, int, bool] | None  # bits, group_size and sym; None if it is kept


def first_told(described: dict[str, Any], name: str) -> Told:
    """`get_dynamic_override` of vllm 0.33.0 gptq_utils.py and sglang 0.5.23 utils.py."""
    found = described
    for pattern, values in described.get("dynamic", {}).items():
        if re.match(pattern.removeprefix("-:").removeprefix("+:"), name):
            if pattern.startswith("-:"):
                return None
            found = described | values
            break
    return found["bits"], found["group_size"], found["sym"]


def told_to_gptqmodel(described: dict[str, Any], name: str) -> Told:
    """`dynamic_get` of gptqmodel 7.7.0 quantization/config.py: all `-:` rules come first."""
    rules = described.get("dynamic", {})
    ordered = sorted(rules, key=lambda rule: not rule.startswith("-:"))
    return first_told(described | {"dynamic": {rule: rules[rule] for rule in ordered}}, name)


def asked(plan: RunPlan, fused: dict[str, list[str]], prefix: str) -> Iterator[tuple[str, Told]]:
    """Yield the modules of an engine, experts and fused linears as one, with what is stored."""
    names = {layer.name for layer in plan.layers}
    stored: dict[str, set[Told]] = {}
    for layer in plan.layers:
        name = re.sub(r"\.experts\.\d+\..*", ".experts", layer.name)
        parent, _, leaf = name.rpartition(".")
        for alias, parts in fused.items():
            if leaf in parts and names.issuperset(f"{parent}.{part}" for part in parts):
                name = f"{parent}.{alias}"
        stored.setdefault(name, set()).add(layer.stored)
    for name, kinds in stored.items():
        (kind,) = kinds
        yield re.sub(r"^model\.language_model\.", prefix, name), kind


@dataclass(frozen=True)
class Model:
    family: str
    directory: Path

    def planned(self, dynamic: dict[str, Any]) -> tuple[RunPlan, QuantizeConfig]:
        config = QuantizeConfig(bits=4, group_size=32, dynamic=dynamic)
        return plan_run(self.directory, config), config

    def described(self, dynamic: dict[str, Any]) -> tuple[RunPlan, dict[str, Any]]:
        plan, config = self.planned(dynamic)
        kept = [layer.name for layer in plan.kept]
        return plan, describe(config, plan.settings, kept, [t.name for t in plan.copied])


@pytest.fixture(scope="module", params=DRAFTED)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(request.param, save_drafted(tmp_path_factory.mktemp("m"), request.param))


# in_proj_a and in_proj_b have two outputs, which cannot be packed.
KEEP: dict[str, Any] = {r"-:.*(in_proj_[ab]|layers\.1\.self_attn\.o_proj)$": {}}
CASES: dict[str, dict[str, Any]] = {
    "nothing else": {},
    "parts by name": {
        r"+:.*\.([qkv]_proj|q_a_proj|kv_a_proj_with_mqa)$": {"group_size": 16},
        r"+:.*((mlp|shared_experts?)\.(gate|up)_proj|in_proj_(qkv|z))$": {"bits": 8},
    },
    "experts by number": {r"+:.*experts\.\d+\.": {"bits": 8, "sym": False}},
    "a block by its full name": {r"+:model\.(language_model\.)?layers\.1\.": {"bits": 8}},
    "a block kept": {r"-:.*layers\.0\.": {}, r"+:.*self_attn": {"sym": False}},
    "names that no linear has": {
        r"+:.*(qkv_proj|gate_up_proj|qkvz|qkv_a_proj.*|experts|layers\.0\..*(o|out)_proj)$": {
            "bits": 8
        }
    },
}


@pytest.mark.parametrize("case", CASES)
def test_engines_are_told_what_is_stored_by_their_names(model: Model, case: str) -> None:
    plan, described = model.described(KEEP | CASES[case])
    wrong = []
    for fused, prefix in ENGINES:
        for name, stored in asked(plan, fused, prefix):
            if first_told(described, name) != stored:
                wrong.append(name)
    for layer in plan.layers:
        if told_to_gptqmodel(described, layer.name) != layer.stored:
            wrong.append(f"gptqmodel: {layer.name}")
    assert wrong == []


@pytest.mark.parametrize("case", CASES)
def test_written_rules_match_no_other_module(model: Model, case: str) -> None:
    dynamic = KEEP | CASES[case]
    plan, described = model.described(dynamic)
    linears = {layer.name: layer.stored for layer in plan.layers}
    modules = {tensor.name.rpartition(".")[0] for tensor in plan.plain.tensors.values()}
    wrong = []
    for rule in described["dynamic"].keys() - dynamic.keys():
        for module in filter(re.compile(rule[2:]).match, modules):
            is_draft = module.startswith(("mtp.", "model.layers.2."))
            expected = linears.get(module, not is_draft)
            told = first_told(described, module) if rule.startswith("+:") else None
            if told != expected and not (is_draft and rule.startswith("-:")):
                wrong.append((rule, module))
    assert wrong == []


DRAFTS = {
    "qwen3_5_moe": ("mtp.layers.0", ["self_attn.qkv_proj", "self_attn.o_proj", "mlp.experts"]),
    "deepseek_v3": (
        "model.layers.2",
        ["self_attn.fused_qkv_a_proj", "self_attn.fused_qkv_a_proj_with_mqa", "mlp.experts"],
    ),
    "glm4_moe": (
        "model.layers.2",
        ["self_attn.qkv_proj", "mlp.experts", "mlp.shared_experts.gate_up_proj"],
    ),
}


def test_blocks_that_draft_are_kept_for_every_engine(model: Model) -> None:
    _, described = model.described(KEEP)
    block, names = DRAFTS[model.family]
    assert [name for name in names if first_told(described, f"{block}.{name}")] == []
    # vllm 0.33.0, qwen3_5_mtp.py: without such a rule it quantizes the block
    rules = [rule for rule in described["dynamic"] if rule.startswith("-:") and "mtp" in rule]
    assert bool(rules) == block.startswith("mtp")


def test_experts_of_blocks_that_draft_keep_no_engine_from_the_model(model: Model) -> None:
    for rules, outcome in ((KEEP, "yes"), (KEEP | {r"-:.*layers\.1\.mlp\.": {}}, "no")):
        plan, config = model.planned(rules)
        assert verdict_of(export_of_layers(plan.layers, config), "sglang").outcome == outcome
    matrices = inspect_checkpoint(open_checkpoint(model.directory)).matrices
    assert [name for name in matrices if name.endswith("layers.1.mlp.experts.2.up_proj")] != []
    draft = DRAFTS[model.family][0]
    assert [name for name in matrices if name.startswith((draft, "model.visual.blocks"))] == []


def test_half_of_each_fused_group_warns(model: Model) -> None:
    half = {
        "qwen3_5_moe": ("in_proj_z", "in_proj_qkvz"),
        "deepseek_v3": ("kv_a_proj_with_mqa", "fused_qkv_a_proj"),
        "glm4_moe": ("v_proj", "qkv_proj"),
    }
    leaf, fused = half[model.family]
    plan, config = model.planned(KEEP | {f"-:.*layers\\.0\\..*\\.{leaf}$": {}})
    (text,) = [text for code, text in remarks(plan, config) if code == "W_CFG_FUSED"]
    assert f".{fused}` differ in settings: not loaded by vllm, sglang" in text


@pytest.mark.parametrize("prefix", ["model.", "model.language_model."])
def test_vllm_asks_for_the_head_beside_a_vision_tower(prefix: str) -> None:
    # hf_to_vllm_mapper of gemma3_mm.py and llava.py in vllm 0.32.0: "lm_head." has a prefix
    config = QuantizeConfig(bits=4, lm_head=True, dynamic={"+:lm_head": {"bits": 8}})
    names = [f"{prefix}layers.0.mlp.{leaf}_proj" for leaf in ("up", "down")]
    quantized = dict.fromkeys(names, config.base)
    quantized["lm_head"] = replace(config.base, bits=8)
    described = describe(config, quantized, [], ["model.embed_tokens.weight"])
    assert first_told(described, "lm_head") == (8, 128, True)
    beside_vision = prefix != "model."
    told = first_told(described, "language_model.lm_head")
    assert (told == (8, 128, True)) == beside_vision
    assert len(described["dynamic"]) == 1 + beside_vision


def test_rules_that_keep_match_whole_names_only() -> None:
    (rule,) = skip_rules(["m.1.mlp.gate"])
    others = ["m.1.mlp.gate_proj", "m.11.mlp.gate", "x.m.1.mlp.gate", "mx1.mlp.gate"]
    found = [name for name in [*others, "m.1.mlp.gate"] if re.match(rule[2:], name)]
    assert found == ["m.1.mlp.gate"]


def test_without_drafts_and_other_settings_there_are_no_rules() -> None:
    config = QuantizeConfig(bits=4)
    names = [f"model.layers.{block}.mlp.{leaf}_proj" for block in (0, 1) for leaf in ("gate", "up")]
    quantized = dict.fromkeys(names, config.base)
    others = ["model.embed_tokens.weight", "model.layers.0.norm.weight", "lm_head.weight"]
    assert "dynamic" not in describe(config, quantized, [], others)
    called_mtp = {f"mtp_decoder.{name}": layer for name, layer in quantized.items()}
    assert "dynamic" not in describe(config, called_mtp, [], [*others, "mtp.norm.weight"])
