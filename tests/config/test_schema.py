"""The configuration model: defaults, derived values, and the layers that a rule reaches."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from gptq_cli.config.fields import Accepts, LayerOverrides, size_in_bytes
from gptq_cli.config.layer import PRESETS, LayerConfig
from gptq_cli.config.schema import QuantizeConfig
from gptq_cli.errors import ConfigError


def test_defaults_are_those_of_balanced_and_of_optimum() -> None:
    config = QuantizeConfig(bits=4)
    expected = {
        "dataset": None,
        "group_size": 128,
        "damp_percent": 0.05,
        "desc_act": False,
        "act_group_aware": True,
        "sym": True,
        "true_sequential": True,
        "format": "gptq",
        "backend": None,
        "seqlen": 2048,
        "nsamples": 128,
        "batch_size": 8,
        "seed": 0,
        "static_groups": True,
        "signed_scales": True,
        "scale_search": "mse",
        "refine_sweeps": 4,
        "asymmetric_calibration": 0.0,
        "loss_aware": False,
        "damp_mode": "diagonal",
        "preset": "balanced",
        "modules_in_block_to_quantize": None,
        "dynamic": {},
        "lm_head": False,
        "device": "auto",
        "dtype": "auto",
        "max_shard_size": "5GB",
        "trust_remote_code": False,
    }
    assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("given", "derived"),
    [
        ({"desc_act": True}, {"act_group_aware": False, "static_groups": False, "format": "gptq"}),
        (
            {"desc_act": True, "static_groups": True},
            {"act_group_aware": False, "static_groups": True},
        ),
        ({"desc_act": True, "act_group_aware": False}, {"act_group_aware": False}),
        ({"sym": False}, {"format": "gptq_v2"}),
        ({"sym": False, "format": "gptq"}, {"format": "gptq"}),
        ({"dynamic": {"+:.*": {"sym": False}}}, {"format": "gptq_v2", "sym": True}),
        ({"dynamic": {"+:.*": {"sym": False}}, "format": "gptq"}, {"format": "gptq"}),
        ({"nsamples": 3}, {"batch_size": 3}),
        ({"nsamples": 300}, {"batch_size": 8}),
        ({"preset": "act-order"}, {"static_groups": True, "act_group_aware": True}),
        ({"preset": "act-order", "static_groups": False}, {"static_groups": False}),
        (
            {"preset": "balanced"},
            {"static_groups": True, "signed_scales": True, "damp_mode": "diagonal"},
        ),
        (
            {"preset": "balanced", "sym": False},
            {"static_groups": True, "signed_scales": False, "format": "gptq_v2"},
        ),
        (
            {"preset": "balanced", "signed_scales": False, "damp_mode": "mean"},
            {"signed_scales": False},
        ),
        (
            {"preset": "balanced", "damp_percent": 0.3},
            {"damp_percent": 0.3, "damp_mode": "diagonal"},
        ),
        (
            {"preset": "best"},
            {"asymmetric_calibration": "auto", "signed_scales": True, "refine_sweeps": 4},
        ),
        (
            {"preset": "best", "asymmetric_calibration": 0.0},
            {"asymmetric_calibration": 0.0, "refine_sweeps": 4},
        ),
        ({"preset": "fast"}, {"scale_search": "none", "refine_sweeps": 0, "signed_scales": True}),
        (
            {"signed_scales": None, "scale_search": None},
            {"signed_scales": True, "scale_search": "mse"},
        ),
        (
            {"group_size": None, "dynamic": None, "sym": None},
            {"group_size": 128, "dynamic": {}, "sym": True},
        ),
    ],
)
def test_unset_fields_follow_the_fields_that_are_set(
    given: dict[str, Any], derived: dict[str, Any]
) -> None:
    config = QuantizeConfig(bits=4, **given)
    assert {name: getattr(config, name) for name in derived} == derived


def test_fields_set_are_the_given_and_the_derived_ones() -> None:
    config = QuantizeConfig(bits=4, desc_act=True, preset="gptq")
    assert config.model_fields_set == {
        "bits",
        "desc_act",
        "preset",
        "act_group_aware",
        "static_groups",
    }


@pytest.mark.parametrize(
    "given",
    [
        {"desc_act": True, "act_group_aware": True},
        {"batch_size": 9, "nsamples": 8},
        {"batch_size": 129},
        {"dynamic": {"-:lm_head": {"bits": 8}}},
        {"dynamic": {"+:.*": {"desc_act": True, "act_group_aware": True}}},
        {"desc_act": True, "dynamic": {"+:.*": {"act_group_aware": True}}},
        {"sym": False, "signed_scales": True},
        {"sym": False, "dynamic": {"+:.*": {"signed_scales": True}}},
        {"dynamic": {"+:.*": {"signed_scales": True, "sym": False}}},
        {"refine_sweeps": -1},
        {"refine_sweeps": 1.0},
        {"refine_sweeps": True},
        {"asymmetric_calibration": 1.1},
        {"asymmetric_calibration": -0.1},
        {"asymmetric_calibration": "0.5"},
        {"scale_search": "hessian"},
        {"scale_search": False},
        {"damp_mode": "median"},
        {"bits": 9},
        {"bits": "4"},
        {"unknown": 1},
        {"damp_percent": float("nan")},
    ],
)
def test_contradictions_and_wrong_values_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        QuantizeConfig(**{"bits": 4, **given})


def test_a_configuration_is_immutable() -> None:
    config = QuantizeConfig(bits=4)
    with pytest.raises(ValidationError):
        config.bits = 8  # type: ignore[misc]


@pytest.mark.parametrize(
    ("size", "n_bytes"),
    [
        ("5GB", 5_000_000_000),
        ("500 MiB", 500 * 2**20),
        ("1.5kb", 1500),
        (1024, 1024),
        ("77", 77),
        ("2TiB", 2**41),
    ],
)
def test_shard_sizes_are_numbers_of_bytes(size: int | str, n_bytes: int) -> None:
    assert size_in_bytes(size) == n_bytes
    assert QuantizeConfig(bits=4, max_shard_size=size).max_shard_bytes == n_bytes


@pytest.mark.parametrize("size", [0, -1, "0GB", "GB", "5 parsecs", "1e9", "", "٣GB", "5GB\n"])
def test_a_wrong_size_is_refused(size: int | str) -> None:
    with pytest.raises(ValueError, match="size"):
        size_in_bytes(size)


def test_negative_rules_win_then_the_first_match_decides() -> None:
    config = QuantizeConfig(
        bits=4,
        preset="gptq",
        dynamic={
            r"+:.*\.mlp\..*": {"bits": 8, "group_size": 64},
            r".*\.down_proj": {"bits": 3},
            r"-:.*layers\.1\.": {},
            r"+:.*\.o_proj": {"damp_percent": 0.5},
        },
    )
    base = LayerConfig(bits=4)
    assert config.for_layer("model.layers.0.mlp.down_proj") == LayerConfig(bits=8, group_size=64)
    assert config.for_layer("model.layers.1.mlp.down_proj") is None
    assert config.for_layer("model.layers.11.mlp.up_proj") == LayerConfig(bits=8, group_size=64)
    assert config.for_layer("model.layers.2.self_attn.o_proj") == LayerConfig(
        bits=4, damp_percent=0.5
    )
    assert config.for_layer("model.layers.2.self_attn.q_proj") == base


def test_rules_match_from_the_start_of_a_name() -> None:
    config = QuantizeConfig(bits=4, dynamic={"-:down_proj": {}, r"-:model\.layers\.1": {}})
    assert config.for_layer("model.layers.2.mlp.down_proj") is not None
    assert config.for_layer("model.layers.12.mlp.up_proj") is None


def test_each_choice_has_a_reason() -> None:
    config = QuantizeConfig(bits=4, dynamic={"-:a": {}, "b": {"bits": 8}})
    assert [config.choose(name).why for name in "abc"] == [
        "rule '-:a': kept",
        "rule 'b'",
        "default",
    ]


def test_a_rule_with_desc_act_turns_off_act_group_aware() -> None:
    config = QuantizeConfig(bits=4, preset="act-order", dynamic={"+:a": {"desc_act": True}})
    assert config.for_layer("a") == LayerConfig(desc_act=True, act_group_aware=False)
    assert config.for_layer("b") == LayerConfig(static_groups=True)


def test_modules_in_block_match_the_end_of_a_name() -> None:
    config = QuantizeConfig(
        bits=4, modules_in_block_to_quantize=[["self_attn.q_proj"], ["mlp.down_proj", "up_proj"]]
    )
    names = [
        "self_attn.q_proj",
        "self_attn.k_proj",
        "mlp.up_proj",
        "mlp.experts.3.up_proj",
        "mlp.up_proj.lora",
    ]
    assert [config.reaches(name) for name in names] == [True, False, True, True, False]
    assert QuantizeConfig(bits=4).reaches("anything")


def test_every_layer_setting_applies_and_can_be_overridden() -> None:
    settings = {
        "bits": 3, "group_size": 64, "sym": True, "desc_act": False, "act_group_aware": False,
        "static_groups": True, "signed_scales": True, "scale_search": "mse", "refine_sweeps": 2,
        "damp_mode": "diagonal", "damp_percent": 0.2, "asymmetric_calibration": 0.5,
        "loss_aware": True,
    }  # fmt: skip
    expected = LayerConfig(**settings)
    assert set(settings) == set(LayerConfig.__slots__) == set(LayerOverrides.__annotations__)
    assert QuantizeConfig(**settings).for_layer("a") == expected
    assert QuantizeConfig(bits=8, dynamic={"a": settings}).for_layer("a") == expected


def test_a_rule_with_asym_turns_off_signed_scales() -> None:
    config = QuantizeConfig(
        bits=4, preset="gptq", signed_scales=True, dynamic={"+:a": {"sym": False}}
    )
    assert config.for_layer("a") == LayerConfig(sym=False)
    assert config.for_layer("b") == LayerConfig(signed_scales=True)


def test_a_rule_may_turn_signed_scales_on_again() -> None:
    config = QuantizeConfig(
        bits=4, preset="gptq", sym=False, dynamic={"+:a": {"sym": True, "signed_scales": True}}
    )
    assert config.for_layer("a") == LayerConfig(signed_scales=True)


def test_each_preset_gives_its_settings() -> None:
    assert PRESETS["gptq"].settings == {}
    for name, preset in PRESETS.items():
        config = QuantizeConfig(bits=4, preset=name)
        assert {key: getattr(config, key) for key in preset.settings} == preset.settings
        assert QuantizeConfig(bits=4, preset=name, sym=False).base.signed_scales is False


def test_each_field_describes_the_values_it_accepts() -> None:
    for name, info in QuantizeConfig.model_fields.items():
        assert any(isinstance(item, Accepts) for item in info.metadata), name


@pytest.mark.parametrize("field", ["max_ram", "max_vram", "max_shard_size"])
def test_a_wrong_size_is_refused_under_the_name_of_its_field(field: str) -> None:
    with pytest.raises(ConfigError, match=f'{field} must be a size such as .*, got "lots"'):
        QuantizeConfig(**{"bits": 4, field: "lots"})


def test_a_memory_limit_is_a_number_of_bytes() -> None:
    assert QuantizeConfig(bits=4, max_ram="64GB", max_vram=10**9).max_ram_bytes == 64 * 10**9
