"""Which engine loads what: every cell that was executed or read, and no engine judged without a source."""

from __future__ import annotations

import re
from typing import Any

import pytest

from gptq_cli.config.layer import LayerConfig
from gptq_cli.config.schema import QuantizeConfig
from gptq_cli.config.serving import export_of, settings_export, target_problems, verdicts
from gptq_cli.config.serving_table import ENGINES, Export

NAMES = [
    "vllm",
    "sglang",
    "transformers",
    "gptqmodel",
    "llama.cpp",
    "exllamav2",
    "tgi",
    "auto-round",
]
SIGNS = {"+": "yes", "~": "limited", "w": "wrong", "-": "no"}


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
        ({}, "gptq", "+ + + + + + + +"),
        ({"group_size": 32}, "gptq", "+ + + + + + + +"),
        ({"group_size": -1}, "gptq", "+ + + + + + + +"),
        ({"group_size": 16}, "gptq", "- - ~ ~ + + ~ +"),
        ({"group_size": 256}, "gptq", "- - + + + + ~ +"),
        ({"group_size": 96}, "gptq", "- - - - + - ~ +"),
        ({"bits": 8}, "gptq", "~ + + + + - + +"),
        ({"bits": 2}, "gptq", "- ~ + + + - ~ +"),
        ({"bits": 3}, "gptq", "- ~ + + - - - +"),
        ({"desc_act": True}, "gptq", "~ + + + + + + -"),
        ({"desc_act": True, "static_groups": True}, "gptq", "+ + + + + + + +"),
        ({}, "gptq_v2", "+ + + + + + + w"),
        ({"bits": 2}, "gptq_v2", "- w + + + - w w"),
        ({"sym": False}, "gptq", "- ~ + - + + ~ -"),
        ({"sym": False}, "gptq_v2", "- w + + + + w -"),
    ],
)
def test_verdicts_agree_with_the_written_table(
    settings: dict[str, Any], format: str, row: str
) -> None:
    layers = [LayerConfig(**settings), LayerConfig(**settings, damp_percent=0.2)]
    assert outcomes(layers, format) == dict(
        zip(NAMES, [SIGNS[sign] for sign in row.split()], strict=True)
    )


def test_fewer_engines_read_mixed_bits() -> None:
    mixed = [LayerConfig(bits=4), LayerConfig(bits=8)]
    assert outcomes(mixed) == dict(
        zip(NAMES, ["limited", "limited", "no", "yes", "no", "no", "no", "yes"], strict=True)
    )
    head = outcomes([LayerConfig()], lm_head=True)
    assert head == dict(
        zip(NAMES, ["yes", "yes", "wrong", "yes", "yes", "yes", "limited", "wrong"], strict=True)
    )


def test_rules_have_reasons_and_engines_have_dated_sources() -> None:
    for engine in ENGINES:
        assert engine.source
        assert re.fullmatch(r"202\d-\d\d", engine.date)
        assert all(rule.reason and rule.outcome != "yes" for rule in engine.rules)


def test_engines_read_experts_if_they_know_the_names() -> None:
    def judged(*parts: str, **odd: LayerConfig | None) -> dict[str, str]:
        layers = {
            f"model.layers.0.mlp.experts.3.{part}": odd.get(part, LayerConfig()) for part in parts
        }
        return by_engine(
            export_of({"model.layers.0.q_proj": LayerConfig(), **layers}, "gptq", lm_head=False)
        )

    three = ("gate_proj", "up_proj", "down_proj")
    plain, renamed = judged(*three), judged("w1", "w2")
    for split in (judged(*three, up_proj=LayerConfig(bits=8)), judged(*three, down_proj=None)):
        assert (split["vllm"], split["sglang"]) == ("no", "no")
    assert judged(*three, up_proj=LayerConfig(damp_percent=0.3)) == plain
    assert (plain["vllm"], plain["transformers"], plain["gptqmodel"], plain["auto-round"]) == (
        "yes",
        "wrong",
        "yes",
        "yes",
    )
    assert (renamed["vllm"], renamed["gptqmodel"], renamed["auto-round"]) == ("yes", "no", "wrong")
    assert judged()["transformers"] == "yes"


def test_engines_that_fuse_refuse_groups_stored_in_two_ways() -> None:
    def judged(**leaves: LayerConfig | None) -> dict[str, str]:
        layers = {f"model.layers.0.{leaf}": config for leaf, config in leaves.items()}
        return by_engine(
            export_of({"model.layers.1.q_proj": LayerConfig(), **layers}, "gptq", lm_head=False)
        )

    four, eight = LayerConfig(), LayerConfig(bits=8)
    for split in (judged(q_proj=four, k_proj=None), judged(gate_proj=eight, up_proj=four)):
        assert (split["vllm"], split["sglang"]) == ("no", "no")
    for whole in (
        judged(q_proj=None, k_proj=None, v_proj=None),
        judged(q_proj=eight, k_proj=eight, o_proj=four),
    ):
        assert (whole["vllm"], whole["sglang"]) in (("yes", "yes"), ("limited", "limited"))
    assert judged(q_proj=four, k_proj=None)["gptqmodel"] == "yes"


def test_fewer_engines_read_narrow_experts() -> None:
    turned = by_engine(
        export_of({"h.0.c_attn": LayerConfig()}, "gptq", lm_head=False, transposed=True)
    )
    assert (turned["transformers"], turned["llama.cpp"], turned["gptqmodel"]) == (
        "no",
        "wrong",
        "yes",
    )

    def narrow(**settings: Any) -> str:
        layers = {"layers.0.experts.1.down_proj": LayerConfig(**settings)}
        return by_engine(export_of(layers, "gptq", lm_head=False, narrow_experts=True))["vllm"]

    assert (narrow(), narrow(desc_act=True), narrow(bits=8), narrow(bits=8, group_size=-1)) == (
        "limited",
        "wrong",
        "no",
        "limited",
    )
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
        "vllm does not load 3 bits: it serves 4 and 8 bits only",
        "vllm does not load asymmetric grids: it serves symmetric checkpoints only",
        "vllm does not load group_size 16, 128: group_size must be -1, 32, 64 or 128",
    ]
    assert problems[0].hint == "what would load: --bits 4 or 8; as it is, it loads in gptqmodel"


@pytest.mark.parametrize("target", [*NAMES, "any"])
def test_target_problems_agree_with_the_table(target: str) -> None:
    plain = {"layers.0.q_proj": LayerConfig()}
    exports = [export_of(plain, "gptq", lm_head=False), export_of(plain, "gptq", lm_head=True)]
    for settings, format in (
        ({"bits": 3}, "gptq"),
        ({"bits": 8}, "gptq_v2"),
        ({"desc_act": True}, "gptq"),
    ):
        exports.append(
            export_of({"layers.0.q_proj": LayerConfig(**settings)}, format, lm_head=False)
        )
    for export in exports:
        judged = by_engine(export)
        bad = [
            engine
            for engine in NAMES
            if judged[engine] in ("no", "wrong") and target in (engine, "any")
        ]
        said = " ".join(problem.message for problem in target_problems(export, target))
        assert [
            engine
            for engine in NAMES
            if f"{engine} does not load" in said or f"{engine} would mis" in said
        ] == bad
        assert target_problems(export, None) == []


def test_settings_export_needs_only_a_configuration() -> None:
    mixed = QuantizeConfig(
        bits=4, sym=False, lm_head=True, dynamic={"-:.*q": {}, "+:.*o_proj": {"bits": 8}}
    )
    export = settings_export(mixed)
    assert (export.bits, export.asym, export.v2, export.mixed, export.lm_head) == (
        {4, 8},
        True,
        True,
        True,
        True,
    )
    assert not settings_export(
        QuantizeConfig(bits=4, dynamic={"+:.*o_proj": {"damp_percent": 0.2}})
    ).mixed
