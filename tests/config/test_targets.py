"""Which engine loads what: every cell that was executed or read, and no engine judged without a source."""

from __future__ import annotations

from typing import Any

import pytest

from gptq_cli.config.layer import LayerConfig
from gptq_cli.config.targets import ENGINES, Export, verdicts

NAMES = ["vllm", "sglang", "transformers", "gptqmodel", "llama.cpp", "exllamav2", "tgi", "auto-round"]
SIGNS = {"+": "yes", "~": "limited", "w": "wrong", "-": "no"}


def outcomes(layers: list[LayerConfig], format: str = "gptq", lm_head: bool = False) -> dict[str, str]:
    return {verdict.engine: verdict.outcome for verdict in verdicts(Export.of(layers, format, lm_head))}


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
def test_verdicts_are_those_of_the_portable_matrix(settings: dict[str, Any], format: str, row: str) -> None:
    layers = [LayerConfig(**settings), LayerConfig(**settings, damp_percent=0.2)]
    assert outcomes(layers, format) == dict(zip(NAMES, [SIGNS[sign] for sign in row.split()], strict=True))


def test_layers_with_different_bits_and_a_quantized_head_have_fewer_readers() -> None:
    mixed = [LayerConfig(bits=4), LayerConfig(bits=8)]
    assert outcomes(mixed) == dict(
        zip(NAMES, ["limited", "limited", "no", "yes", "no", "no", "no", "yes"], strict=True)
    )
    head = outcomes([LayerConfig()], lm_head=True)
    assert head == dict(zip(NAMES, ["yes", "yes", "wrong", "yes", "yes", "yes", "limited", "wrong"], strict=True))


def test_every_remark_has_a_reason_and_every_engine_a_dated_source() -> None:
    for engine in ENGINES:
        assert "2026" in engine.source
        assert all(rule.reason and rule.outcome != "yes" for rule in engine.rules)


def test_experts_are_read_by_engines_that_know_their_names() -> None:
    def judged(*parts: str, split: bool = False) -> dict[str, str]:
        names = [f"model.layers.0.mlp.experts.3.{part}" for part in parts]
        export = Export.of([LayerConfig()], "gptq", False, names=names, split_experts=split)
        return {verdict.engine: verdict.outcome for verdict in verdicts(export)}

    plain, renamed, split = (
        judged("gate_proj", "up_proj", "down_proj"),
        judged("w1", "w2"),
        judged("up_proj", split=True),
    )
    assert (plain["vllm"], plain["transformers"], plain["gptqmodel"], plain["auto-round"]) == (
        "yes",
        "wrong",
        "yes",
        "yes",
    )
    assert (renamed["vllm"], renamed["gptqmodel"], renamed["auto-round"]) == ("yes", "no", "wrong")
    assert (split["vllm"], split["sglang"]) == ("no", "no")
    assert judged()["transformers"] == "yes"
