"""The strict loader: scalars of YAML 1.2, refusals with their place, and JSON."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptq_cli.config.strict_yaml import MAX_BYTES, load, parse, parse_scalar
from gptq_cli.errors import ConfigError, Location, Problem

Json = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**18), 10**18)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs", "Cc"])),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text("abc_ :-é", min_size=1), inner, max_size=3)
    ),
    max_leaves=12,
)


def problems_of(text: str | bytes) -> list[Problem]:
    data = text.encode() if isinstance(text, str) else text
    try:
        return list(parse(data, "c.yaml").problems)
    except ConfigError as error:
        return list(error.problems)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("no", "no"),
        ("yes", "yes"),
        ("on", "on"),
        ("true", True),
        ("False", False),
        ("1e-3", 0.001),
        ("1.5E2", 150.0),
        (".5", 0.5),
        ("-.inf", -math.inf),
        ("010", 10),
        ("0o10", 8),
        ("0x1F", 31),
        ("-7", -7),
        ("1_000", "1_000"),
        ("12:30:45", "12:30:45"),
        ("2026-11-20", "2026-11-20"),
        ("=", "="),
        ("~", None),
        ("", None),
        ("'4'", "4"),
        ('"true"', "true"),
        ("5GB", "5GB"),
        ("cuda:1", "cuda:1"),
    ],
)
def test_scalars_follow_yaml_1_2(text: str, value: object) -> None:
    found = parse(f"key: {text}\n".encode(), "c.yaml").values["key"]
    assert (type(found), found) == (type(value), value)


def test_nan_is_a_number() -> None:
    assert math.isnan(parse(b"key: .nan", "c.yaml").values["key"])


def test_every_key_and_value_has_its_place() -> None:
    text = b"bits: 4\nmodules:\n  - [a,  b]\n  - [c]\ndynamic:\n  '+:x': {bits:   8}\n"
    at = {}
    for path, place in parse(text, "c.yaml").places.items():
        at[path] = (place.key.line, place.key.column, place.value.column)
    assert at["bits",] == (1, 1, 7)
    assert at["modules", 0, 1] == (3, 10, 10)
    assert at["modules", 1, 0] == (4, 6, 6)
    assert at["dynamic", "+:x"] == (6, 3, 10)
    assert at["dynamic", "+:x", "bits"] == (6, 11, 19)


@pytest.mark.parametrize(
    ("text", "line", "column", "words"),
    [
        ("bits: 4\nsym: true\nbits: 8\n", 3, 1, "bits is given twice, first in c.yaml:1:1"),
        ("a: {x: 1, x: 2}\n", 1, 11, "x is given twice, first in c.yaml:1:5"),
        ("a: &here 1\n", 1, 4, "the anchor &here is not allowed"),
        ("a: 1\nb: *here\n", 2, 4, "the alias *here is not allowed"),
        (
            "a: !!python/object:os.system ls\n",
            1,
            4,
            "tag tag:yaml.org,2002:python/object:os.system is not allowed",
        ),
        ("a: !mine {}\n", 1, 4, "the tag !mine is not allowed"),
        ("a: 1\n\tb: 2\n", 2, 1, "a tab cannot indent or separate"),
        ("a:\t1\n", 1, 3, "a tab cannot indent or separate"),
        ("a: 1\n  b: 2\n", 2, 4, "a key cannot stand here"),
        ("a: 1\n---\nb: 2\n", 2, 1, "a second document begins here"),
        ('a: "+:.*\\.x"\n', 1, 10, "not an escape inside double quotes"),
        ("a: @x\n", 1, 4, "this character cannot begin a value"),
        ("é: 1\nb: [1, 2\n", 3, 1, "expected ',' or ']'"),
        ("a: x\n- 1\n", 2, 1, "expected <block end>"),
        ("? [a]\n: 1\n", 1, 3, "a key must be a word"),
        ("a: 1\n4: x\n", 2, 1, "the key 4 is not a text"),
        ("\ufeffa: 1\n", 1, 1, "begins with a byte order mark"),
        ("a: x\x07\n", 1, 5, "the character U+0007 is not allowed"),
        ("- 1\n- 2\n", 1, 1, "a configuration is a mapping"),
        ("", 1, 1, "a configuration is a mapping"),
        ("# nothing\n", 1, 1, "a configuration is a mapping"),
        ("a: " + "[" * 80 + "]" * 80, 1, 68, "more than 64 levels deep"),
        ("a: " + "9" * 5000, 1, 4, "a number of 5000 digits is not allowed"),
        ('{"a": "\\ud83d"}', 1, 7, "half of a surrogate pair"),
    ],
)
def test_ambiguous_yaml_is_refused_with_its_place(
    text: str, line: int, column: int, words: str
) -> None:
    problem = problems_of(text)[0]
    assert problem.code == "E_CFG_YAML"
    assert words in problem.message
    assert problem.location == Location("c.yaml", line, column)


@pytest.mark.parametrize(
    ("text", "line", "column"), [(b"a: 1\nb: \xff\n", 2, 4), ("é: ".encode() + b"\x80", 1, 4)]
)
def test_bytes_that_are_not_utf8_are_refused_with_their_place(
    text: bytes, line: int, column: int
) -> None:
    (problem,) = problems_of(text)
    assert "is not UTF-8" in problem.message
    assert problem.location == Location("c.yaml", line, column)


def test_parse_continues_after_anchors_aliases_and_tags() -> None:
    found = problems_of("a: &x 1\na: 2\nb: *x\nc: !t 3\n")
    assert [problem.location.line for problem in found if problem.location] == [1, 3, 4, 2]


@pytest.mark.parametrize("indent", [None, 2, "\t"])
def test_json_with_any_indentation_has_places(indent: str | int | None) -> None:
    values = {
        "bits": 4,
        "dataset": ["tab\there", 'é "q" 😀', "\\d"],
        "dynamic": {"+:.*": {"sym": False}},
        "x": None,
    }
    document = parse(json.dumps(values, indent=indent).encode(), "c.json")
    assert document.values == values
    assert not document.problems
    line = document.places["dynamic", "+:.*", "sym"].value.line
    if indent is None:
        assert line == 1
    else:
        assert line == 10


def test_flow_yaml_keeps_a_tab_inside_quotes() -> None:
    assert parse(b"{dataset: 'a\tb'}", "c.yaml").values == {"dataset": "a\tb"}


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.text("abc", min_size=1), Json, max_size=4))
def test_parse_reads_json_like_the_json_module(values: dict[str, Any]) -> None:
    document = parse(json.dumps(values).encode(), "c.json")
    assert document.values == values
    assert not document.problems


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=60) | st.text("abn:-[]{}&*!'\"#|>\n\t 01.e", max_size=40).map(str.encode))
def test_parse_of_any_bytes_gives_yaml_problems_only(data: bytes) -> None:
    assert {problem.code for problem in problems_of(data)} <= {"E_CFG_YAML"}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("4", 4),
        ("0.1", 0.1),
        ("no", "no"),
        ("{bits: 8}", {"bits": 8}),
        ("", None),
        ("a #b", "a #b"),
        ("a: b", "a: b"),
        ("'4'", "4"),
        ("*x", "*x"),
        ("1\nx: 3", "1\nx: 3"),
        ("[a, b]", ["a", "b"]),
    ],
)
def test_parse_scalar_reads_a_value_or_plain_text(text: str, value: object) -> None:
    assert parse_scalar(text) == value


def test_load_of_an_unreadable_file_names_the_reason(tmp_path: Path) -> None:
    cases = {
        tmp_path: "is a directory",
        tmp_path / "none.yaml": "No such file",
        Path("/dev/zero"): "not a regular file",
        Path("a\0b"): "null",
    }
    for path, words in cases.items():
        with pytest.raises(ConfigError, match=words) as caught:
            load(path)
        assert caught.value.code == "E_CFG_FILE"


def test_load_refuses_a_file_larger_than_1_mb(tmp_path: Path) -> None:
    large = tmp_path / "large.yaml"
    large.write_bytes(b"#" * (MAX_BYTES + 1))
    with pytest.raises(ConfigError, match="is larger than 1 MB") as caught:
        load(large)
    assert caught.value.code == "E_CFG_YAML"
