"""The table of engines: each verdict was executed or read, and each engine has a source."""

from __future__ import annotations

import re
from typing import Any

import pytest

from gptq_cli.config.layer import LayerConfig
from gptq_cli.config.resolve import settings_export
from gptq_cli.config.schema import QuantizeConfig
from gptq_cli.config.serving import ENGINES, Export, export_of, target_problems, verdicts

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
    assert outcomes(layers, format) == expected(row)


def test_fewer_engines_read_mixed_bits() -> None:
    mixed = [LayerConfig(bits=4), LayerConfig(bits=8)]
    assert outcomes(mixed) == expected("~ ~ - + - - - +")


def test_fewer_engines_read_a_quantized_head() -> None:
    assert outcomes([LayerConfig()], lm_head=True) == expected("+ + w + + + ~ w")


def test_rules_have_reasons_and_engines_have_dated_sources() -> None:
    for reader in (reader for engine in ENGINES for reader in engine.readers):
        assert reader.source
        assert re.fullmatch(r"202\d-\d\d", reader.date)
        assert all(rule.reason and rule.outcome != "yes" for rule in reader.rules)


def test_an_engine_loads_no_format_that_the_table_does_not_give_it() -> None:
    export = one_layer("mlx", lm_head=False)
    (verdict,) = [verdict for verdict in verdicts(export) if verdict.engine == "vllm"]
    assert (verdict.outcome, verdict.reason) == ("no", "it does not read mlx")
    (problem,) = target_problems(export, "vllm")
    assert problem.message == "vllm does not load format mlx: it does not read mlx"
    assert problem.hint.startswith("what would load: --format gptq")


PARTS = ("gate_proj", "up_proj", "down_proj")


def expert(*parts: str, **changed: LayerConfig | None) -> dict[str, str]:
    """Return the outcomes for a model that has an expert with these parts."""
    layers: dict[str, LayerConfig | None] = {"model.layers.0.q_proj": LayerConfig()}
    for part in parts:
        layers[f"model.layers.0.mlp.experts.3.{part}"] = changed.get(part, LayerConfig())
    return by_engine(export_of(layers, "gptq", lm_head=False))


def test_engines_read_experts_if_they_know_the_names() -> None:
    plain, renamed = expert(*PARTS), expert("w1", "w2")
    assert (plain["vllm"], plain["gptqmodel"], plain["auto-round"]) == ("yes", "yes", "yes")
    assert (renamed["vllm"], renamed["gptqmodel"], renamed["auto-round"]) == ("yes", "no", "wrong")


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
    for engines in (all_kept, all_eight):
        assert (engines["vllm"], engines["sglang"]) in (("yes", "yes"), ("limited", "limited"))
    assert judged(q_proj=four, k_proj=None)["gptqmodel"] == "yes"


def test_fewer_engines_read_conv1d_models() -> None:
    layers = {"h.0.c_attn": LayerConfig()}
    engines = by_engine(export_of(layers, "gptq", lm_head=False, transposed=True))
    assert engines["transformers"] == "no"
    assert engines["llama.cpp"] == "wrong"
    assert engines["gptqmodel"] == "yes"


@pytest.mark.parametrize(
    ("settings", "outcome"),
    [
        ({}, "limited"),
        ({"desc_act": True}, "wrong"),
        ({"bits": 8}, "no"),
        ({"bits": 8, "group_size": -1}, "limited"),
    ],
)
def test_vllm_reads_narrow_experts_with_limits(settings: dict[str, Any], outcome: str) -> None:
    layers = {"layers.0.experts.1.down_proj": LayerConfig(**settings)}
    export = export_of(layers, "gptq", lm_head=False, narrow_experts=True)
    assert by_engine(export)["vllm"] == outcome


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
        "vllm does not load 3 bits: it serves 4 and 8 bits only",
        "vllm does not load asymmetric grids: it serves symmetric checkpoints only",
        "vllm does not load group_size 16, 128: group_size must be -1, 32, 64 or 128",
    ]
    assert problems[0].hint == "what would load: --bits 4 or 8; as it is, it loads in gptqmodel"


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
