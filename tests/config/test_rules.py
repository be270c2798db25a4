"""Rules as text, and rules that reach nothing."""

from __future__ import annotations

from typing import Any

import pytest

from gptq_cli.config.rules import first_match, parse_rule, unmatched_rules


@pytest.mark.parametrize(
    ("text", "rule", "settings"),
    [
        ("-:lm_head", "-:lm_head", {}),
        ('+:.*down={"bits":8}', "+:.*down", {"bits": 8}),
        ("+:.*down={bits: 8, sym: false}", "+:.*down", {"bits": 8, "sym": False}),
        (r"+:(?=.*x){2}={bits: 8}", r"+:(?=.*x){2}", {"bits": 8}),
        ("+:a={b}={bits: 2}", "+:a={b}", {"bits": 2}),
        ("-:a{3}", "-:a{3}", {}),
    ],
)
def test_a_rule_and_its_settings_are_told_apart(text: str, rule: str, settings: dict[str, Any]) -> None:
    assert parse_rule(text) == (rule, settings)


def test_first_match_agrees_with_a_plain_walk_over_negatives_then_the_rest() -> None:
    rules = ["+:a.*", "-:ab", "a", "-:.*c"]
    assert {name: first_match(rules, name) for name in ("ab", "ac", "ad", "b", "bc")} == {
        "ab": "-:ab",
        "ac": "-:.*c",
        "ad": "+:a.*",
        "b": None,
        "bc": "-:.*c",
    }


def test_rules_that_reach_no_layer_are_found() -> None:
    names = ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.up_proj"]
    assert unmatched_rules({"-:down_proj": {}, "+:.*up_proj": {}, "lm_head": {}}, iter(names)) == [
        "-:down_proj",
        "lm_head",
    ]
