"""The file of what engines did, from which the table of docs/compatibility.md is made."""

from __future__ import annotations

import dataclasses
import datetime
import json
import subprocess
from pathlib import Path
from typing import Any

from gptq_cli.config.serving import Export
from tests.engines.cases import CASES, Case
from tests.engines.engines import LARGEST_DIFFERENCE, Engine

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "benchmarks" / "engines.json"
SOURCES = Path(__file__).with_name("requirements") / "sources.txt"
VERSIONS = """
import importlib.metadata, json, sys
print(json.dumps({name: importlib.metadata.version(name) for name in sys.argv[1:]}))
"""


class Results:
    """The results of this run, in place of those that earlier runs wrote of the same engines."""

    def __init__(self, file: Path, environments: Path) -> None:
        self._file, self._environments = file, environments
        self._new: set[str] = set()
        self._engines: dict[str, Any] = {}
        self._cases: dict[str, Any] = {}
        if file.exists():
            content = json.loads(file.read_text())
            self._engines = content["engines"]
            for row in content["cases"]:
                self._cases[row["id"]] = row

    def note(self, engine: Engine, case: Case, export: Export, seen: dict[str, Any]) -> None:
        """Note what an engine did with a case, of which the table of engines sees `export`."""
        if engine.name not in self._new:
            self._new.add(engine.name)
            self._engines[engine.name] = {
                "date": datetime.date.today().isoformat(),
                "versions": self._versions(engine),
            }
        row = self._cases.setdefault(case.id, {"id": case.id, "seen": {}})
        row |= {"section": case.section, "title": case.title, "export": _plain(export)}
        row["seen"][engine.name] = seen
        self._write()  # each time, so that a run that is cut off has its results

    def _write(self) -> None:
        rows = [self._cases[case.id] for case in CASES if case.id in self._cases]
        content = {"limits": LARGEST_DIFFERENCE, "engines": self._engines, "cases": rows}
        self._file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    def _versions(self, engine: Engine) -> dict[str, str]:
        python = self._environments / engine.environment / "bin/python"
        command = [python, "-c", VERSIONS, *engine.packages]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        versions: dict[str, str] = json.loads(done.stdout)
        for line in SOURCES.read_text().splitlines():
            package, _, version = line.partition("==")
            if package == engine.source:
                versions[package] = version
        return versions


def _plain(export: Export) -> dict[str, Any]:
    """Return the fields of `export` as JSON has them, without those of no interest: false ones."""
    fields = {}
    for name, value in dataclasses.asdict(export).items():
        if isinstance(value, frozenset):
            value = sorted(value)
        if value:
            fields[name] = value
    return fields


def export_of(fields: dict[str, Any]) -> Export:
    """Return the Export of which `fields` were written; those that are left out are false."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(Export):
        values[field.name] = fields.get(field.name, False)
        if "frozenset" in str(field.type):
            values[field.name] = frozenset(fields.get(field.name, ()))
    return Export(**values)
