"""Every code that the program can print is explained, and no other."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from gptq_cli.cli.explain import explanations

from .conftest import Run

PACKAGE = Path(__file__).parents[2] / "gptq_cli"
CODES = PACKAGE / "cli" / "codes.yaml"


def used_codes() -> set[str]:
    """Return the codes of errors and warnings that the sources name."""
    codes: set[str] = set()
    for file in PACKAGE.rglob("*.py"):
        codes.update(re.findall(r"[\"']([EW]_[A-Z0-9_]+)[\"']", file.read_text()))
    return codes


def test_every_code_of_the_sources_has_a_text() -> None:
    missing = sorted(used_codes() - set(explanations()))
    file = CODES.relative_to(PACKAGE.parent)
    assert not missing, f"explain in {file} their cause and remedy: {missing}"


def test_every_text_has_a_code_in_the_sources() -> None:
    stale = sorted(set(explanations()) - used_codes())
    file = CODES.relative_to(PACKAGE.parent)
    assert not stale, f"no source has these codes, delete them from {file}: {stale}"


def test_texts_are_sorted_and_give_a_cause_and_a_remedy() -> None:
    texts = explanations()
    assert list(texts) == sorted(texts)
    for code, text in texts.items():
        first, *rest = text.splitlines()
        assert first.endswith("."), code
        assert rest, code
        assert max(map(len, text.splitlines())) <= 120
    keys = re.findall(r"^([EW]_\w+):", CODES.read_text(), flags=re.MULTILINE)
    assert len(keys) == len(set(keys)) == len(yaml.safe_load(CODES.read_text()))


def test_explain_takes_a_code_in_any_spelling(gptq: Run) -> None:
    for code in ("E_SHAPE", "e_shape", "e-shape"):
        result = gptq("explain", code)
        assert (result.exit_code, result.stderr) == (0, "")
        assert result.stdout.startswith("E_SHAPE\n\nA layer's size does not fit the group size")
    assert json.loads(gptq("explain", "E_SHAPE", "--json").stdout)["code"] == "E_SHAPE"
    listing = gptq("explain").stdout.splitlines()
    assert len(listing) == len(explanations())


@pytest.mark.parametrize(
    ("code", "hint"),
    [
        ("E_SHAP", "did you mean E_SHAPE?"),
        ("E_ALOC", "did you mean E_ALLOC_GOAL?"),
        ("e_out_exist", "did you mean E_OUT_EXISTS?"),
        ("zzz", "gptq explain lists all codes"),
        ("E_XY", "gptq explain lists all codes"),
    ],
)
def test_an_unknown_code_gets_the_nearest_as_hint(code: str, hint: str, gptq: Run) -> None:
    result = gptq("explain", code)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == f"error[E_CODE]: there is no code `{code}`\n\nhint: {hint}\n"
