"""Sizes, times, JSON and wrapped prose."""

from __future__ import annotations

import json
import math

import pytest

from gptq_cli.cli.console import as_json_text, fitted
from gptq_cli.errors import clock, size


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 KB"),
        (5_400_000, "5.4 MB"),
        (999_900, "1 MB"),
        (1.234e12, "1.23 TB"),
        (5e15, "5e+03 TB"),
    ],
)
def test_sizes_have_three_digits(n_bytes: float, text: str) -> None:
    assert size(n_bytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0:00:00"), (59.6, "0:01:00"), (3723.4, "1:02:03")]
)
def test_times_are_hours_minutes_seconds(seconds: float, text: str) -> None:
    assert clock(seconds) == text


def test_json_has_null_for_nan_and_infinity() -> None:
    data = {"a": [math.nan, math.inf, 1.5], "b": {"c": (-math.inf, True)}}
    assert json.loads(as_json_text(data)) == {"a": [None, None, 1.5], "b": {"c": [None, True]}}


def test_only_a_narrow_terminal_wraps_prose(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    line = "NAME      what it is for, and /a/path/that/is/longer/than/the/terminal/is/wide"
    monkeypatch.setenv("COLUMNS", "40")
    assert fitted(line, 10) == line
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    shown = fitted(line, 10).splitlines()
    assert shown[0] == "NAME      what it is for, and"
    assert shown[1:] == [" " * 10 + "/a/path/that/is/longer/than/the/terminal/is/wide"]
    monkeypatch.setenv("COLUMNS", "200")
    assert fitted(line, 10) == line
