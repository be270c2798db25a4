#!/usr/bin/env python3
"""Print what the results of scripts/gpu_checks.sh say, in sixty lines at most.

    python scripts/gpu_digest.py DIRECTORY

DIRECTORY holds the unpacked results; files that are not there, or not complete, are left out.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import argument_parser

LINES, WIDTH = 60, 190
RUNS = ("llama-3-8b", "best", "qwen3-30b-a3b", "capped", "llama-3-70b")


def content(folder: Path, name: str) -> Any:
    """Return the content of a JSON file, {} if it is absent or cut off."""
    try:
        return json.loads((folder / f"{name}.json").read_text())
    except (OSError, ValueError):
        return {}


def lines_of(folder: Path, name: str) -> list[str]:
    """Return the lines of a text file, none if it is absent."""
    try:
        return (folder / name).read_text(errors="replace").splitlines()
    except OSError:
        return []


def of_quality(folder: Path) -> Iterator[str]:
    """Yield a line for each check of quality."""
    for name, check in content(folder, "quality").items():
        figures = {key: value for key, value in check.items() if key != "holds"}
        yield f"quality: {name}: {'holds' if check['holds'] else 'FAILS'} {rounded(figures)}"


def of_tests(folder: Path) -> Iterator[str]:
    """Yield the summary of the tests, and those that failed."""
    lines = lines_of(folder, "tests.log")
    yield from (f"tests: {line}" for line in lines[-1:])
    failures = [line for line in lines if re.match("(FAILED|ERROR) ", line)]
    yield from (f"tests: {line}" for line in failures[:6])


def of_engine(folder: Path) -> Iterator[str]:
    """Yield the rates, and the parts of a block beside their floors, in milliseconds."""
    found = content(folder, "engine")
    if not found:
        return
    yield f"engine: rates {rounded(found['rates'])}"
    cells = []
    for name, row in found["block"].items():
        cells.append(f"{name} {row['seconds'] * 1e3:.1f}/{row['floor'] * 1e3:.1f}")
    yield f"engine: ms/floor {', '.join(cells)}"


def of_runs(folder: Path) -> Iterator[str]:
    """Yield the figures of each run of a known shape, and its error if it failed."""
    for name in RUNS:
        run = content(folder, name)
        if not run:
            continue
        keys = ["seconds", "scaled_seconds", "peak_device_bytes", "peak_host_resident_bytes"]
        keys += ["relative_error", "rtn_relative_error", "idle_share", "error"]
        figures = {key: run[key] for key in keys if run.get(key) is not None}
        yield f"run {name}: blocks {rounded(run['block_seconds'])} s, {rounded(figures)}"
        yield from (f"run {name}: {warning}" for warning in run["warnings"][:2])


def of_trace(folder: Path) -> Iterator[str]:
    """Yield the longest operations of a traced block."""
    lines = lines_of(folder, "llama-3-8b-trace.json.txt")
    for line in lines[3:15]:
        yield f"trace: {re.sub('  +', ' ', line)}"


def of_measure(folder: Path) -> Iterator[str]:
    """Yield each measurement of the rates of single operations."""
    for name, figures in content(folder, "measure").items():
        if isinstance(figures, dict):
            yield f"measure: {name} {rounded(figures)}"


def of_failures(folder: Path) -> Iterator[str]:
    """Yield the last lines of the logs of failed parts."""
    for line in lines_of(folder, "parts.txt"):
        name, _, told = line.partition(": ")
        if "exit code 0" not in told:
            yield from (f"{name} log: {last}" for last in lines_of(folder, f"{name}.log")[-3:])


def rounded(value: Any) -> str:
    """Return JSON of a value with three digits of each number."""
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {rounded(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(rounded, value)) + "]"
    return str(value)


def main() -> int:
    parser = argument_parser(__doc__)
    parser.add_argument("directory", type=Path)
    folder = parser.parse_args().directory
    lines = [*lines_of(folder, "parts.txt"), *lines_of(folder, "env.log")]
    for part in (of_failures, of_quality, of_tests, of_runs, of_engine, of_trace, of_measure):
        lines += part(folder)
    for line in lines[:LINES]:
        print(line[:WIDTH])
    return 0


if __name__ == "__main__":
    sys.exit(main())
