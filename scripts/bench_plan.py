#!/usr/bin/env python3
"""Estimated against measured peak memory of `gptq quantize` on the CPU, for models and samples of several sizes.

What counts is private resident memory (RssAnon, sampled every 10 ms), as in bench_memory.py.

    python scripts/bench_plan.py [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench_memory import ROOT, flags, quantize_and_watch, save_random_model

TOLERANCE = 0.25
CASES: list[dict[str, Any]] = [
    {"hidden": 256, "width": 768, "dtype": "float32", "samples": 8, "seqlen": 128},
    {"hidden": 512, "width": 1536, "dtype": "float32", "samples": 8, "seqlen": 128},
    {"hidden": 1024, "width": 4096, "dtype": "float32", "samples": 8, "seqlen": 128},
    {"hidden": 512, "width": 1536, "dtype": "float32", "samples": 64, "seqlen": 512},
    {"hidden": 1024, "width": 2816, "dtype": "bfloat16", "samples": 32, "seqlen": 512},
    {
        "hidden": 1024,
        "width": 4096,
        "dtype": "bfloat16",
        "samples": 8,
        "seqlen": 128,
        "no_sequential": True,
    },
]


def shape_of(case: dict[str, Any]) -> dict[str, Any]:
    """A Llama of three blocks."""
    shape = {
        "hidden_size": case["hidden"],
        "intermediate_size": case["width"],
        "head_dim": case["hidden"] // 8,
    }
    shape |= {"num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 8}
    return shape | {"max_position_embeddings": 2048, "dtype": case["dtype"]}


def estimated(model: Path, words: list[str]) -> int:
    """What `gptq plan` says for the CPU."""
    command = [sys.executable, "-m", "gptq_cli", "plan", str(model), *words, "--json"]
    found = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    peak: int = json.loads(found.stdout)["memory"]["cpu"]["peak_bytes"]
    return peak


def main() -> int:
    """Print a table; the exit code is 1 if an estimate is off by more than the tolerance."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    rows = []
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder:
            model = Path(folder) / "model"
            save_random_model(model, "llama", **shape_of(case))
            words = flags(
                Path(folder), windows=case["samples"], seqlen=case["seqlen"], repeats=4000
            )
            words += ["--no-true-sequential"] if case.get("no_sequential") else []
            said = estimated(model, words)
            seen, _ = quantize_and_watch(model, Path(folder) / "out", words)
        rows.append({**case, "estimated_bytes": said, "measured_bytes": seen, "ratio": said / seen})
        print(
            f"{case}: estimated {said / 1e6:.0f} MB, measured {seen / 1e6:.0f} MB, ratio {said / seen:.2f}",
            flush=True,
        )
    if arguments.json:
        arguments.json.write_text(
            json.dumps({"tolerance": TOLERANCE, "rows": rows}, indent=2) + "\n"
        )
    return int(any(abs(row["ratio"] - 1) > TOLERANCE for row in rows))


if __name__ == "__main__":
    sys.exit(main())
