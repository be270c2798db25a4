"""The results of `make test-engines`, the page made from them, and the table of engines agree."""

from __future__ import annotations

import importlib.util
import itertools
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.engines.cases import CASES
from tests.engines.engines import ENGINES, can_try, known_words
from tests.engines.results import RESULTS, export_of
from tests.engines.verdicts import said_of

ROOT = Path(__file__).resolve().parents[1]
CONTENT: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8"))


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    spec = importlib.util.spec_from_file_location("engine_table", ROOT / "scripts/engine_table.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "engine_table", module)
    spec.loader.exec_module(module)
    return module


def test_results_are_of_known_engines_and_checkpoints() -> None:
    known = {case.id: case for case in CASES}
    engines = {engine.name: engine for engine in ENGINES}
    strange = []
    for row in CONTENT["cases"]:
        for name in row["seen"]:
            if row["id"] not in known or not can_try(engines[name], known[row["id"]]):
                strange.append((name, row["id"]))
    assert strange == []
    assert len(CONTENT["cases"]) == len(CASES) > 90


def test_every_engine_ran_on_every_checkpoint() -> None:
    missing = []
    rows = {row["id"]: row for row in CONTENT["cases"]}
    for engine, case in itertools.product(ENGINES, CASES):
        tried = engine.name in rows[case.id]["seen"]
        if can_try(engine, case) and not tried:
            missing.append((engine.name, case.id))
    assert missing == []


def test_the_table_says_what_the_engines_did() -> None:
    different = []
    for row in CONTENT["cases"]:
        for engine, seen in row["seen"].items():
            said = said_of(engine, export_of(row["export"]))
            if seen["outcome"] not in (said, "other"):
                different.append((engine, row["id"], said, seen["outcome"]))
    assert different == []


def test_engines_refuse_in_known_words() -> None:
    unknown = []
    for row in CONTENT["cases"]:
        for engine, seen in row["seen"].items():
            if seen["outcome"] == "no" and not known_words(engine, seen["words"]):
                unknown.append((engine, row["id"], seen["words"]))
    assert unknown == []


def test_the_page_shows_the_results(script: ModuleType) -> None:
    page = script.page(CONTENT)
    assert (ROOT / "docs" / "compatibility.md").read_text(encoding="utf-8") == page
    for about in CONTENT["engines"].values():
        for version in about["versions"].values():
            assert version in page
