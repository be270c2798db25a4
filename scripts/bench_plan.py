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

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from scripts.bench_memory import private_bytes  # noqa: E402

TOLERANCE = 0.25
CASES = [
    {"hidden": 256, "width": 768, "dtype": "float32", "samples": 8, "seqlen": 128},
    {"hidden": 512, "width": 1536, "dtype": "float32", "samples": 8, "seqlen": 128},
    {"hidden": 1024, "width": 4096, "dtype": "float32", "samples": 8, "seqlen": 128},
    {"hidden": 512, "width": 1536, "dtype": "float32", "samples": 64, "seqlen": 512},
    {"hidden": 1024, "width": 2816, "dtype": "bfloat16", "samples": 32, "seqlen": 512},
    {"hidden": 1024, "width": 4096, "dtype": "bfloat16", "samples": 8, "seqlen": 128, "no_sequential": True},
]


def make_model(directory: Path, case: dict[str, object]) -> None:
    """A random Llama of three blocks, saved by a process of its own."""
    code = f"""
import torch
from pathlib import Path
from tests.families import save_model
save_model(Path({str(directory)!r}), "llama", hidden_size={case["hidden"]}, intermediate_size={case["width"]},
           num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=8, head_dim={case["hidden"]} // 8,
           max_position_embeddings=2048, dtype=torch.{case["dtype"]})
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)


def flags(case: dict[str, object], text: Path) -> list[str]:
    words = ["--bits", "4", "--dataset", str(text), "--nsamples", str(case["samples"]), "--seqlen", str(case["seqlen"])]
    return [*words, "--batch-size", "4", *(["--no-true-sequential"] if case.get("no_sequential") else [])]


def estimated(model: Path, words: list[str]) -> int:
    """What `gptq plan` says for the CPU."""
    command = [sys.executable, "-m", "gptq_cli", "plan", str(model), *words, "--json"]
    found = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    peak: int = json.loads(found.stdout)["memory"]["cpu"]["peak_bytes"]
    return peak


def measured(model: Path, output: Path, words: list[str]) -> int:
    """The peak of a run."""
    command = [sys.executable, "-m", "gptq_cli", "quantize", str(model), "-o", str(output), "--quiet", *words]
    process, peak = subprocess.Popen([*command, "--device", "cpu"], cwd=ROOT, stdout=subprocess.DEVNULL), 0
    while True:
        try:
            process.wait(0.01)
            break
        except subprocess.TimeoutExpired:
            peak = max(peak, private_bytes(process.pid))
    if process.returncode:
        raise SystemExit(f"gptq quantize failed with exit code {process.returncode}")
    return peak


def main() -> int:
    """Print a table; the exit code is 1 if an estimate is off by more than the tolerance."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    rows = []
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder:
            model, text = Path(folder) / "model", Path(folder) / "text.txt"
            text.write_text("some words to calibrate on, more or less different each time " * 4000)
            make_model(model, case)
            words = flags(case, text)
            said, seen = estimated(model, words), measured(model, Path(folder) / "out", words)
        rows.append({**case, "estimated_bytes": said, "measured_bytes": seen, "ratio": said / seen})
        print(
            f"{case}: estimated {said / 1e6:.0f} MB, measured {seen / 1e6:.0f} MB, ratio {said / seen:.2f}", flush=True
        )
    if arguments.json:
        arguments.json.write_text(json.dumps({"tolerance": TOLERANCE, "rows": rows}, indent=2) + "\n")
    return int(any(abs(row["ratio"] - 1) > TOLERANCE for row in rows))


if __name__ == "__main__":
    sys.exit(main())
