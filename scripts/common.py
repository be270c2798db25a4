"""Parts that the scripts share: arguments, results as JSON, and random models.

Importing this module makes the packages `gptq_cli` and `tests` of the source tree importable.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "scripts" / "demo"
sys.path.insert(0, str(ROOT))


def argument_parser(document: str | None) -> argparse.ArgumentParser:
    """Return a parser whose help shows the docstring of a script as it stands."""
    formatter = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(description=document, formatter_class=formatter)


def benchmark_parser(document: str | None) -> argparse.ArgumentParser:
    """Return a parser that has the option of every benchmark, `--json`."""
    parser = argument_parser(document)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    return parser


def write_json(file: Path | None, content: object) -> None:
    """Write figures to `file`, which is old or new at any moment; write nothing if it is None."""
    if file is not None:
        unfinished = file.with_name(f".{file.name}.unfinished")
        unfinished.write_text(json.dumps(content, indent=2) + "\n")
        unfinished.replace(file)


def name_of(file: Path) -> str:
    """Return a file with its folder: several files may be called evaluation.jsonl."""
    return f"{file.resolve().parent.name}/{file.name}"


def median_of(rows: Iterable[Mapping[str, Any]], key: str) -> float:
    """Return the median of one figure over the rows of a result."""
    return statistics.median(row[key] for row in rows)


def save_random_model(
    directory: Path, family: str, *, dtype: str = "float32", **shape: object
) -> None:
    """Save a random model with its tokenizer, as `tests.families.save_model` does.

    A process of its own makes the model, so that none of its memory stays in this one.
    """
    code = f"""
import torch
from pathlib import Path
from tests.families import save_model
save_model(Path({str(directory)!r}), {family!r}, dtype=torch.{dtype}, **{shape!r})
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)
