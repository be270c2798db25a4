"""A resolved configuration that is written as YAML is valid input and resolves to itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from gptq_cli.config.resolve import resolve, to_yaml
from gptq_cli.config.schema import QuantizeConfig
from gptq_cli.config.strict_yaml import parse

SAMPLES: list[dict[str, Any]] = [
    {"bits": 4},
    {"bits": 3, "group_size": -1, "sym": False, "dataset": "1e-3", "text_column": "no"},
    {
        "bits": 8,
        "desc_act": True,
        "damp_percent": 1e-05,
        "dataset": ["0o17", "~", "a: b # c\n\n d", "é😀", " x "],
    },
    {
        "bits": 2,
        "dynamic": {
            "-:.*[ab]{2}: x#'\"": {},
            "z": {"bits": 8, "sym": False},
            "+:a": {"damp_percent": 0.3},
        },
    },
    {
        "bits": 4,
        "modules_in_block_to_quantize": [["q", "k"], ["true"]],
        "max_shard_size": 10**9,
        "nsamples": 2,
    },
    {
        "bits": 3,
        "preset": "balanced",
        "scale_search": "none",
        "dynamic": {"+:a": {"sym": False, "damp_mode": "mean"}},
    },
    {"bits": 2, "preset": "balanced", "sym": False, "refine_sweeps": 3},
    {
        "bits": 4,
        "preset": "act-order",
        "device": "cuda:1",
        "backend": "torch",
        "dataset": "x" * 300,
    },
]


@pytest.mark.parametrize("values", SAMPLES)
@pytest.mark.parametrize(
    "origins", [None, {"bits": "--bits", "dynamic": "c.yaml:3", "dataset": "GPTQ_DATASET"}]
)
def test_written_yaml_resolves_to_an_equal_configuration(
    values: dict[str, Any], origins: dict[str, str] | None, tmp_path: Path
) -> None:
    config = QuantizeConfig(**values)
    path = tmp_path / "gptq_config.yaml"
    path.write_text(to_yaml(config, origins), encoding="utf-8")
    again = resolve({}, {}, path)
    assert again.config == config
    assert list(again.config.dynamic) == list(config.dynamic)
    assert again.notes == ()


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), min_size=1, max_size=3)
)
def test_yaml_1_1_and_1_2_readers_find_the_same_text(texts: list[str]) -> None:
    written = to_yaml(QuantizeConfig(bits=4, dataset=texts))
    assert parse(written.encode(), "c.yaml").values["dataset"] == texts
    assert yaml.safe_load(written)["dataset"] == texts


@pytest.mark.parametrize(
    "text", ["a\u00a0b", "\u200dé", "\u202e[31m\x1b", "\x85 \x7f", "not utf-8 \udcff"]
)
def test_written_yaml_is_printable_and_keeps_each_text(text: str) -> None:
    written = to_yaml(QuantizeConfig(bits=4, dataset=[text, "é"]))
    assert written.replace("\n", "").isprintable()
    assert parse(written.encode(), "c.yaml").values["dataset"] == [text, "é"]


@pytest.mark.parametrize("name", ["a\nbits: 8", "a\u2028bits: 8", "\udcff"])
def test_a_file_name_stays_inside_its_comment(name: str) -> None:
    written = to_yaml(
        QuantizeConfig(bits=4, dataset=["a", "b"]), {"bits": f"{name}:1", "dataset": f"{name}:2"}
    )
    found = parse(written.encode(), "c.yaml")
    assert (found.values["bits"], found.values["dataset"]) == (4, ["a", "b"])
    assert found.problems == ()


def test_parse_refuses_half_of_a_surrogate_pair() -> None:
    (problem,) = parse(b'dataset: "\\uD800"', "c.yaml").problems
    assert problem.message == "a text holds half of a surrogate pair"
    assert parse(b'dataset: "\\uDCFF"', "c.yaml").values["dataset"] == "\udcff"


def test_a_comment_names_the_origin_of_each_value() -> None:
    text = to_yaml(
        QuantizeConfig(bits=4, dynamic={"a": {"bits": 8}}),
        {"bits": "--bits", "dynamic": "c.yaml:3"},
    )
    assert "bits: 4  # --bits\n" in text
    assert "# c.yaml:3\ndynamic:\n  a:\n    bits: 8\n" in text
    assert "sym: true\n" in text
