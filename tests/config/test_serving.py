"""The table of engines: each verdict was executed or read, and each engine has a source."""

from __future__ import annotations

import re
from typing import Any

import pytest

from gptq_cli.config.layer import LayerConfig
from gptq_cli.config.resolve import settings_export
from gptq_cli.config.schema import QuantizeConfig
from gptq_cli.config.serving import (
    ENGINES,
    Export,
    export_of,
    find_target,
    target_hint,
    target_problems,
    verdict_of,
    verdicts,
)

NAMES = [
    "vllm",
    "sglang",
    "transformers",
    "gptqmodel",
    "llama.cpp",
    "openvino",
    "lmdeploy",
    "onnxruntime-genai",
    "exllamav2",
    "auto-round",
    "aphrodite",
]
SIGNS = {"+": "yes", "~": "limited", "w": "wrong", "-": "no"}


def expected(row: str) -> dict[str, str]:
    """Return the outcome of each engine in NAMES from a row of SIGNS."""
    return dict(zip(NAMES, [SIGNS[sign] for sign in row.split()], strict=True))


def outcomes(
    layers: list[LayerConfig], format: str = "gptq", lm_head: bool = False
) -> dict[str, str]:
    named = {f"layers.{index}.down_proj": layer for index, layer in enumerate(layers)}
    return by_engine(export_of(named, format, lm_head=lm_head))


def by_engine(export: Export) -> dict[str, str]:
    return {verdict.engine: verdict.outcome for verdict in verdicts(export)}


@pytest.mark.parametrize(
    ("settings", "format", "row"),
    [
        # vllm sglang transformers gptqmodel llama.cpp openvino lmdeploy onnx exllamav2 auto-round
        ({}, "gptq", "+ + + + + + + + + + +"),
        ({"group_size": 32}, "gptq", "+ + + + + + - + + + +"),
        ({"group_size": -1}, "gptq", "+ + ~ ~ + + - + + + +"),
        ({"group_size": 16}, "gptq", "- - ~ ~ + + - + + + -"),
        ({"group_size": 256}, "gptq", "- - + + + + - + + + -"),
        ({"group_size": 96}, "gptq", "- - - - + - - + - + -"),
        ({"bits": 8}, "gptq", "~ + + + + - - + - + +"),
        ({"bits": 2}, "gptq", "- - + + + - - + - + -"),
        ({"bits": 3}, "gptq", "- - + + - - - - - + -"),
        ({"desc_act": True}, "gptq", "- + + + + w - + + - ~"),
        ({"desc_act": True, "group_size": -1}, "gptq", "+ + ~ ~ + + - + + - +"),
        ({"desc_act": True, "static_groups": True}, "gptq", "+ + + + + + + + + + +"),
        ({}, "gptq_v2", "+ + + + + + w w + w +"),
        ({"bits": 2}, "gptq_v2", "- - + + + - - w - w -"),
        ({"sym": False}, "gptq", "- - + - + w - + + - -"),
        ({"sym": False}, "gptq_v2", "- - + + + w - w + - -"),
    ],
)
def test_verdicts_agree_with_the_written_table(
    settings: dict[str, Any], format: str, row: str
) -> None:
    layers = [LayerConfig(**settings), LayerConfig(**settings, damp_percent=0.2)]
    assert outcomes(layers, format) == expected(row)


def test_fewer_engines_read_mixed_settings() -> None:
    bits = [LayerConfig(bits=4), LayerConfig(bits=8)]
    assert outcomes(bits) == expected("~ + - + - - - + - + +")
    groups = [LayerConfig(group_size=128), LayerConfig(group_size=32)]
    assert outcomes(groups) == expected("+ + - + + - - + - + +")


def test_fewer_engines_read_a_quantized_head() -> None:
    assert outcomes([LayerConfig()], lm_head=True) == expected("+ + w + + w ~ + + w +")


def judged(target: str, format: str = "gptq", **settings: Any) -> str:
    """Return the outcome of one target for a checkpoint of one layer."""
    return verdict_of(one_layer(format, lm_head=False, **settings), target).outcome


@pytest.mark.parametrize(
    ("settings", "target", "outcome"),
    [
        ({"desc_act": True}, "vllm", "no"),
        ({"desc_act": True}, "vllm@0.30", "no"),
        ({"desc_act": True}, "vllm@0.33.0", "no"),
        ({"desc_act": True}, "vllm@0.29.0", "limited"),
        ({"bits": 3}, "sglang", "no"),
        ({"bits": 3}, "sglang@0.5.20", "no"),
        ({"bits": 3}, "sglang@0.5.19", "limited"),
        ({"bits": 8}, "vllm/cuda", "yes"),
        ({"bits": 8}, "vllm/rocm", "limited"),
        ({"bits": 8}, "vllm/cpu", "no"),
        ({"bits": 8}, "vllm@0.32/cpu", "no"),
        ({}, "vllm@0.29/cpu", "yes"),
        ({}, "sglang/rocm", "no"),
        ({"group_size": 16}, "gptqmodel/cpu", "no"),
        ({"group_size": 16}, "transformers/cpu", "limited"),
        ({"group_size": -1}, "gptqmodel/cpu", "no"),
        ({"group_size": -1}, "transformers/cpu", "no"),
        ({"group_size": -1, "bits": 8}, "transformers/cpu", "yes"),
    ],
)
def test_a_target_names_a_version_and_a_platform(
    settings: dict[str, Any], target: str, outcome: str
) -> None:
    assert judged(target, **settings) == outcome


@pytest.mark.parametrize(
    "target",
    ["vlm", "vllm@0.28.9", "vllm@0.34", "vllm@1", "vllm@x", "vllm@", "vllm/", "vllm/tpu",
     "llama.cpp@1", "llama.cpp/cpu", "any@1", "vllm/cpu@0.30", "sglang@0.5.24", "vllm@0.30.0.0.1"],
)  # fmt: skip
def test_targets_that_the_table_does_not_know_are_none(target: str) -> None:
    assert find_target(target) is None


def test_hints_tell_the_known_versions_and_platforms() -> None:
    assert target_hint("vllm@9") == "--target vllm, or with @0.29 to @0.33, /cuda, /cpu, /rocm"
    assert target_hint("gptqmodel@9") == "--target gptqmodel, or with @7.7, /cuda, /cpu"
    assert target_hint("llama.cpp@9") == "--target llama.cpp"
    assert target_hint("vlm@9") is None


def test_known_versions_enclose_those_of_the_rules() -> None:
    for engine in ENGINES:
        for reader in engine.readers:
            for rule in reader.rules:
                named = [version for version in (rule.since, rule.until) if version]
                assert [v for v in named if not find_target(f"{engine.name}@{v}")] == []
                assert rule.on == "" or rule.on in engine.platforms


FORMATS = [
    ("compressed-tensors", "vllm", {}, "yes"),
    ("compressed-tensors", "vllm", {"bits": 3}, "limited"),
    ("compressed-tensors", "vllm", {"bits": 2, "sym": False}, "limited"),
    ("compressed-tensors", "vllm/cpu", {"sym": False}, "yes"),
    ("compressed-tensors", "vllm/cpu", {"bits": 3}, "no"),
    ("compressed-tensors", "gptqmodel", {"bits": 3}, "yes"),
    ("compressed-tensors", "gptqmodel", {"sym": False}, "no"),
    ("auto-round", "auto-round", {"sym": False}, "yes"),
    ("compressed-tensors", "sglang", {"bits": 3}, "no"),
    ("compressed-tensors", "sglang", {"sym": False}, "yes"),
    ("compressed-tensors", "sglang", {"bits": 8, "sym": False}, "no"),
    ("compressed-tensors", "transformers", {"bits": 3}, "yes"),
    ("compressed-tensors", "transformers", {"sym": False}, "no"),
    ("compressed-tensors", "llama.cpp", {"bits": 3}, "no"),
    ("compressed-tensors", "llama.cpp", {"group_size": -1}, "no"),
    ("compressed-tensors", "llama.cpp", {"bits": 8, "sym": False}, "yes"),
    ("compressed-tensors", "lmdeploy", {"group_size": 32}, "yes"),
    ("compressed-tensors", "lmdeploy", {"group_size": 64}, "no"),
    ("auto-round", "vllm", {"bits": 3}, "limited"),
    ("auto-round", "vllm", {"sym": False}, "no"),
    ("auto-round", "sglang", {"bits": 3}, "no"),
    ("mlx", "mlx-lm", {"bits": 3, "sym": False}, "yes"),
    ("mlx", "mlx-lm", {"group_size": -1}, "yes"),
    ("mlx", "mlx-lm", {"group_size": 16}, "no"),
    ("mlx", "vllm", {}, "no"),
    ("gptq", "mlx-lm", {}, "no"),
    ("gptq", "exllamav3", {}, "no"),
]


@pytest.mark.parametrize(("format", "target", "settings", "outcome"), FORMATS)
def test_each_format_has_verdicts_of_its_own(
    format: str, target: str, settings: dict[str, Any], outcome: str
) -> None:
    assert judged(target, format, **settings) == outcome


def test_only_engines_that_read_a_format_are_listed_for_it() -> None:
    for format, engines in {"mlx": ["mlx-lm"], "gptq": NAMES, "awq": []}.items():
        found = verdicts(one_layer(format, lm_head=False))
        assert [verdict.engine for verdict in found] == engines


def test_rules_have_reasons_and_engines_have_dated_sources() -> None:
    for reader in (reader for engine in ENGINES for reader in engine.readers):
        assert reader.read
        assert re.fullmatch(r"202\d-\d\d", reader.date)
        assert all(rule.reason and rule.outcome != "yes" for rule in reader.rules)
        assert reader.run or all(rule.seen == "read" for rule in reader.rules)


def test_an_engine_loads_no_format_that_the_table_does_not_give_it() -> None:
    export = one_layer("mlx", lm_head=False)
    verdict = verdict_of(export, "vllm")
    assert (verdict.outcome, verdict.reason) == ("no", "it does not read mlx")
    (problem,) = target_problems(export, "vllm")
    assert problem.message == "vllm does not load format mlx: it does not read mlx"
    assert problem.hint.startswith("use --format gptq")


PARTS = ("gate_proj", "up_proj", "down_proj")


def expert(*parts: str, **changed: LayerConfig | None) -> dict[str, str]:
    """Return the outcomes for a model that has an expert with these parts."""
    layers: dict[str, LayerConfig | None] = {"model.layers.0.q_proj": LayerConfig()}
    for part in parts:
        layers[f"model.layers.0.mlp.experts.3.{part}"] = changed.get(part, LayerConfig())
    return by_engine(export_of(layers, "gptq", lm_head=False))


def test_engines_read_experts_if_they_know_the_names() -> None:
    plain, renamed = expert(*PARTS), expert("w1", "w2")
    assert (plain["vllm"], plain["gptqmodel"], plain["auto-round"]) == ("limited", "yes", "yes")
    assert (renamed["vllm"], renamed["gptqmodel"], renamed["auto-round"]) == (
        "limited",
        "no",
        "wrong",
    )


def test_transformers_misreads_experts() -> None:
    assert expert(*PARTS)["transformers"] == "wrong"
    assert expert()["transformers"] == "yes"


def test_engines_that_fuse_refuse_experts_stored_in_two_ways() -> None:
    mixed_bits = expert(*PARTS, up_proj=LayerConfig(bits=8))
    partly_kept = expert(*PARTS, down_proj=None)
    for engines in (mixed_bits, partly_kept):
        assert (engines["vllm"], engines["sglang"]) == ("no", "no")
    assert expert(*PARTS, up_proj=LayerConfig(damp_percent=0.3)) == expert(*PARTS)


def test_engines_that_fuse_refuse_groups_stored_in_two_ways() -> None:
    def judged(**leaves: LayerConfig | None) -> dict[str, str]:
        layers = {f"model.layers.0.{leaf}": config for leaf, config in leaves.items()}
        return by_engine(
            export_of({"model.layers.1.q_proj": LayerConfig(), **layers}, "gptq", lm_head=False)
        )

    four, eight = LayerConfig(), LayerConfig(bits=8)
    partly_kept = judged(q_proj=four, k_proj=None)
    mixed_bits = judged(gate_proj=eight, up_proj=four)
    for engines in (partly_kept, mixed_bits):
        assert (engines["vllm"], engines["sglang"]) == ("no", "no")
    all_kept = judged(q_proj=None, k_proj=None, v_proj=None)
    all_eight = judged(q_proj=eight, k_proj=eight, o_proj=four)
    assert (all_kept["vllm"], all_kept["sglang"]) == ("yes", "yes")
    assert (all_eight["vllm"], all_eight["sglang"]) == ("limited", "yes")  # not on CPUs
    assert judged(q_proj=four, k_proj=None)["gptqmodel"] == "yes"


def test_gptqmodel_does_not_read_the_names_of_two_families() -> None:
    def read_by_gptqmodel(name: str) -> str:
        export = export_of({name: LayerConfig()}, "gptq", lm_head=False)
        return by_engine(export)["gptqmodel"]

    assert read_by_gptqmodel("model.layers.0.mlp.gate_up_proj") == "no"
    assert read_by_gptqmodel("gpt_neox.layers.0.mlp.dense_h_to_4h") == "wrong"
    assert read_by_gptqmodel("model.layers.0.mlp.gate_proj") == "yes"


def test_transformers_reads_grids_that_differ_in_symmetry_alone() -> None:
    layers = [LayerConfig(), LayerConfig(sym=False)]
    assert outcomes(layers, "gptq_v2")["transformers"] == "yes"


def test_fewer_engines_read_conv1d_models() -> None:
    layers = {"h.0.c_attn": LayerConfig()}
    engines = by_engine(export_of(layers, "gptq", lm_head=False, transposed=True))
    assert engines["transformers"] == "no"
    assert engines["llama.cpp"] == "wrong"
    assert engines["gptqmodel"] == "yes"


@pytest.mark.parametrize(
    ("settings", "outcome"),
    [
        ({}, ["limited", "limited"]),
        ({"desc_act": True}, ["no", "wrong"]),
        ({"bits": 8}, ["limited", "limited"]),
    ],
)
def test_vllm_reads_narrow_experts_with_limits(
    settings: dict[str, Any], outcome: list[str]
) -> None:
    shapes = {"layers.0.experts.1.down_proj": (96, 64)}
    layers = {name: LayerConfig(**settings) for name in shapes}
    narrow = export_of(layers, "gptq", lm_head=False, shapes=shapes)
    wide = export_of(layers, "gptq", lm_head=False, shapes=dict.fromkeys(shapes, (256, 64)))
    assert [verdict_of(narrow, target).outcome for target in ("vllm", "vllm@0.29")] == outcome
    assert "slower kernel" not in verdict_of(wide, "vllm").reason


def test_experts_are_a_limit_of_vllm_on_cpus_only() -> None:
    export = export_of({"layers.0.experts.1.up_proj": LayerConfig()}, "gptq", lm_head=False)
    assert verdict_of(export, "vllm").reason.startswith("not on cpu: its kernel for experts")
    assert verdict_of(export, "vllm/cuda").outcome == "yes"
    assert verdict_of(export, "vllm/cpu").outcome == "no"


def test_sglang_refuses_layers_whose_experts_are_kept() -> None:
    kept = expert(*PARTS, **dict.fromkeys(PARTS))
    assert (kept["sglang"], kept["gptqmodel"], kept["llama.cpp"]) == ("no", "yes", "yes")


def test_widths_decide_on_cpus_after_layers_are_fused() -> None:
    def on_cpu(**widths: int) -> str:
        shapes = {f"layers.0.{leaf}": (width, 64) for leaf, width in widths.items()}
        layers = dict.fromkeys(shapes, LayerConfig())
        return verdict_of(
            export_of(layers, "gptq", lm_head=False, shapes=shapes), "vllm/cpu"
        ).outcome

    assert on_cpu(q_proj=64, k_proj=16, v_proj=16) == "yes"
    assert on_cpu(q_proj=64, k_proj=16, v_proj=32) == "no"
    assert on_cpu(o_proj=48) == "no"


def test_sglang_refuses_asymmetric_experts() -> None:
    asym = export_of(
        {"layers.0.experts.1.down_proj": LayerConfig(sym=False)}, "gptq", lm_head=False
    )
    assert by_engine(asym)["sglang"] == "no"


def test_target_problems_name_every_reason_and_a_remedy() -> None:
    layers = {
        "layers.0.q_proj": LayerConfig(bits=3, group_size=16),
        "layers.0.o_proj": LayerConfig(bits=3, sym=False),
    }
    problems = target_problems(export_of(layers, "gptq_v2", lm_head=False), "vllm")
    assert [problem.code for problem in problems] == ["E_TARGET"] * 3
    assert [problem.message for problem in problems] == [
        "vllm does not load 3 bits: it serves 4 and 8 bits in this format, others on GPUs as "
        "compressed-tensors",
        "vllm does not load asymmetric grids: it serves symmetric grids in this format, others "
        "as compressed-tensors",
        "vllm does not load group_size 16, 128: group_size must be -1, 32, 64 or 128",
    ]
    assert problems[0].hint == "use --bits 4 or 8; as it is, it loads in gptqmodel"


def test_hints_tell_engines_with_limits_from_the_others() -> None:
    ordered = export_of(
        {"q": LayerConfig(desc_act=True, act_group_aware=False)}, "gptq", lm_head=False
    )
    (problem,) = target_problems(ordered, "vllm")
    assert problem.hint is not None
    _, free, limited = re.split(" it loads in | and with limits in ", problem.hint)
    outcomes = by_engine(ordered)
    assert {outcomes[engine] for engine in free.split(", ")} == {"yes"}
    assert {outcomes[engine] for engine in limited.split(", ")} == {"limited"}


def one_layer(format: str, *, lm_head: bool, **settings: Any) -> Export:
    return export_of({"layers.0.q_proj": LayerConfig(**settings)}, format, lm_head=lm_head)


@pytest.mark.parametrize("target", [*NAMES, "any"])
@pytest.mark.parametrize(
    ("settings", "format", "lm_head"),
    [
        ({}, "gptq", False),
        ({}, "gptq", True),
        ({"bits": 3}, "gptq", False),
        ({"bits": 8}, "gptq_v2", False),
        ({"desc_act": True}, "gptq", False),
    ],
)
def test_target_problems_agree_with_the_table(
    settings: dict[str, Any], format: str, lm_head: bool, target: str
) -> None:
    export = one_layer(format, lm_head=lm_head, **settings)
    judged = by_engine(export)
    bad, found = [], []
    text = " ".join(problem.message for problem in target_problems(export, target))
    for engine in NAMES:
        if judged[engine] in ("no", "wrong") and target in (engine, "any"):
            bad.append(engine)
        if f"{engine} does not load" in text or f"{engine} would mis" in text:
            found.append(engine)
    assert found == bad
    assert target_problems(export, None) == []


def test_settings_export_needs_only_a_configuration() -> None:
    mixed = QuantizeConfig(
        bits=4, sym=False, lm_head=True, dynamic={"-:.*q": {}, "+:.*o_proj": {"bits": 8}}
    )
    export = settings_export(mixed)
    assert export.bits == {4, 8}
    assert (export.asym, export.format) == (True, "gptq_v2")
    assert (export.mixed, export.lm_head) == (True, True)


def test_different_damping_does_not_make_an_export_mixed() -> None:
    config = QuantizeConfig(bits=4, dynamic={"+:.*o_proj": {"damp_percent": 0.2}})
    assert not settings_export(config).mixed
