#!/usr/bin/env python3
"""Measure the peak host memory of `gptq quantize` on the CPU, in one of four comparisons.

    python scripts/bench_memory.py [depth | experts | allocation | plan] [--sizes FEW MANY]
        [--json FILE]

depth    two Llamas of one width, with 8 and 32 blocks. The larger one has 440 MB of float32
         weights, so that a run that held them all would show.
experts  two mixtures, with 8 and 64 experts in each block. A block of the larger one has 151 MB of
         float32 weights; the Hessians of all its experts would take 168 MB, those of one 2.6 MB.
allocation  `gptq allocate` beside `gptq quantize` (balanced), for Llamas of 4, 8 and 16 blocks
         with 16,384 tokens of calibration. Their processor time is shown, too.
plan     the estimate of `gptq plan` beside the measured peak, for six models and samples. The exit
         code is 1 if an estimate is off by more than 25 %.

Memory is private resident memory (RssAnon of the process, sampled every 10 ms), because pages of
mapped files belong to the page cache. Prints a line for each run, then what the comparison shows.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from common import ROOT, benchmark_parser, save_random_model, write_json

HEADS: dict[str, Any] = {"num_attention_heads": 8, "num_key_value_heads": 8}
SIZES: dict[str, tuple[int, ...]] = {"depth": (8, 32), "experts": (8, 64), "allocation": (4, 8, 16)}
HIDDEN, EXPERT_INTERMEDIATE = 768, 256
TOLERANCE = 0.25
CASES: list[dict[str, Any]] = [
    {"hidden": 256, "width": 768, "dtype": "float32", "samples": 8, "seqlen": 128},
    {"hidden": 512, "width": 1536, "dtype": "float32", "samples": 8, "seqlen": 128},
    {"hidden": 1024, "width": 4096, "dtype": "float32", "samples": 8, "seqlen": 128},
    {"hidden": 512, "width": 1536, "dtype": "float32", "samples": 64, "seqlen": 512},
    {"hidden": 1024, "width": 2816, "dtype": "bfloat16", "samples": 32, "seqlen": 512},
    {"hidden": 1024, "width": 4096, "dtype": "bfloat16", "samples": 8, "seqlen": 128},
]
CASES[-1]["no_sequential"] = True


# ---------------------------------------------------------------- one run


def flags(folder: Path, *, windows: int = 8, seqlen: int = 128, repeats: int = 400) -> list[str]:
    """Return the flags of a short run at 4 bits on a text that is written to `folder`."""
    text = folder / "text.txt"
    text.write_text("some words to calibrate on, more or less different each time " * repeats)
    sample = ["--nsamples", str(windows), "--seqlen", str(seqlen), "--batch-size", "4"]
    return ["--bits", "4", "--dataset", str(text), *sample]


def peak_and_seconds(model: Path, output: Path, options: list[str]) -> tuple[int, float]:
    """Return the peak private memory in bytes and the wall time of one `gptq quantize`."""
    started = time.perf_counter()
    peak = peak_of("quantize", model, output, options)
    return peak, time.perf_counter() - started


def peak_of(verb: str, model: Path, output: Path, options: list[str]) -> int:
    """Return the peak private memory in bytes of `gptq quantize` or `gptq allocate`."""
    command = [sys.executable, "-m", "gptq_cli", verb, str(model), "-o", str(output)]
    command += ["--quiet", "--device", "cpu", *options]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        peak = max(peak, private_bytes(process.pid))
        time.sleep(0.01)
    if process.returncode:
        raise SystemExit(f"gptq {verb} failed with exit code {process.returncode}")
    return peak


def private_bytes(pid: int) -> int:
    """Return RssAnon of a running process, or 0 if it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    for line in status.splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


# ---------------------------------------------------------------- comparisons


def compare_depths(folder: Path, sizes: list[int]) -> dict[str, Any]:
    """Quantize a Llama with each number of blocks; the ratio is that of the two peaks."""
    rows: list[dict[str, Any]] = []
    options = flags(folder)
    shape = {"hidden_size": 512, "intermediate_size": 1536, "head_dim": 64, **HEADS}
    for n_blocks in sizes:
        model = folder / f"model-{n_blocks}"
        shape["num_hidden_layers"] = n_blocks
        save_random_model(model, "llama", max_shard_size="200MB", **shape)
        weights = sum(file.stat().st_size for file in model.glob("*.safetensors"))
        peak, seconds = peak_and_seconds(model, folder / f"out-{n_blocks}", options)
        row = {"blocks": n_blocks, "weights_bytes": weights, "peak_bytes": peak}
        rows.append({**row, "seconds": seconds})
        print_row(rows[-1])
    ratio = rows[1]["peak_bytes"] / rows[0]["peak_bytes"]
    print(f"peak grows by a factor of {ratio:.3f} from {sizes[0]} to {sizes[1]} blocks")
    return {"rows": rows, "ratio": ratio}


def compare_experts(folder: Path, sizes: list[int]) -> dict[str, Any]:
    """Quantize a mixture with each number of experts; growth is relative to the weights added."""
    rows: list[dict[str, Any]] = []
    options = [*flags(folder), "--preset", "gptq", "--moe-uncovered", "rtn"]
    shape = {"hidden_size": HIDDEN, "moe_intermediate_size": EXPERT_INTERMEDIATE, **HEADS}
    for n_experts in sizes:
        model = folder / f"model-{n_experts}"
        save_random_model(model, "qwen3_moe", num_experts=n_experts, head_dim=64, **shape)
        peak, seconds = peak_and_seconds(model, folder / f"out-{n_experts}", options)
        hessians = HIDDEN**2 + EXPERT_INTERMEDIATE**2
        row = {
            "experts": n_experts,
            "block_experts_bytes": n_experts * 3 * HIDDEN * EXPERT_INTERMEDIATE * 4,
            "all_hessians_bytes": n_experts * hessians * 4,
        }
        rows.append({**row, "peak_bytes": peak, "seconds": seconds})
        print_row(rows[-1])
    few, many = rows
    grown = many["peak_bytes"] - few["peak_bytes"]
    share = grown / (many["block_experts_bytes"] - few["block_experts_bytes"])
    print(f"peak grows by {grown / 1e6:.0f} MB, {share:.2f} times the weights that a block gains")
    return {"rows": rows, "growth_by_weights": share}


def compare_allocations(folder: Path, sizes: list[int]) -> dict[str, Any]:
    """Measure the units of a Llama with each number of blocks, and quantize it.

    The ratio is that of the peaks of the measurement in the deepest and in the shallowest model.
    `slopes` are the processor seconds that a further block takes.
    """
    rows: list[dict[str, Any]] = []
    options = flags(folder, windows=64, seqlen=256, repeats=4000)
    shape = {"hidden_size": 256, "intermediate_size": 768, "head_dim": 32, **HEADS}
    shape["max_position_embeddings"] = 256
    for n_blocks in sizes:
        model = folder / f"model-{n_blocks}"
        shape["num_hidden_layers"] = n_blocks
        save_random_model(model, "llama", **shape)
        row: dict[str, Any] = {"blocks": n_blocks}
        for verb, file, more in (
            ("allocate", "a.yaml", ["--allow-bits", "2,3,4"]),
            ("quantize", "out", ["--preset", "balanced"]),
        ):
            before = processor_seconds()
            peak = peak_of(verb, model, folder / f"{n_blocks}-{file}", [*options, *more])
            row |= {f"{verb}_peak_bytes": peak, f"{verb}_seconds": processor_seconds() - before}
        rows.append(row)
        print_row(row)
    slopes = []
    for one, other in pairwise(rows):
        seconds = other["allocate_seconds"] - one["allocate_seconds"]
        slopes.append(seconds / (other["blocks"] - one["blocks"]))
    ratio = rows[-1]["allocate_peak_bytes"] / rows[0]["allocate_peak_bytes"]
    print(f"peak grows by a factor of {ratio:.3f}; seconds for a further block: {slopes}")
    return {"rows": rows, "ratio": ratio, "slopes": slopes}


def processor_seconds() -> float:
    """Return the processor time of all child processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def compare_plans(folder: Path) -> dict[str, Any]:
    """Measure each case beside the peak that `gptq plan` estimates for it."""
    rows = []
    for number, case in enumerate(CASES):
        own = folder / str(number)
        own.mkdir()
        save_random_model(own / "model", "llama", **shape_of(case))
        options = flags(own, windows=case["samples"], seqlen=case["seqlen"], repeats=4000)
        if case.get("no_sequential"):
            options.append("--no-true-sequential")
        estimated = estimated_peak(own / "model", options)
        measured, _ = peak_and_seconds(own / "model", own / "out", options)
        row = {**case, "estimated_bytes": estimated, "measured_bytes": measured}
        rows.append({**row, "ratio": estimated / measured})
        print_row(rows[-1])
    return {"tolerance": TOLERANCE, "rows": rows}


def shape_of(case: dict[str, Any]) -> dict[str, Any]:
    """Return the shape of a Llama of three blocks."""
    hidden = case["hidden"]
    shape = {"hidden_size": hidden, "intermediate_size": case["width"], "head_dim": hidden // 8}
    shape |= {"num_hidden_layers": 3, "max_position_embeddings": 2048, "dtype": case["dtype"]}
    return shape | HEADS


def estimated_peak(model: Path, options: list[str]) -> int:
    """Return the peak in bytes that `gptq plan` estimates for the CPU."""
    command = [sys.executable, "-m", "gptq_cli", "plan", str(model), *options, "--json"]
    plan = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    peak: int = json.loads(plan.stdout)["memory"]["cpu"]["peak_bytes"]
    return peak


def print_row(row: dict[str, Any]) -> None:
    """Print one run; bytes are in MB."""
    words = []
    for key, value in row.items():
        if key.endswith("_bytes"):
            words.append(f"{key.removesuffix('_bytes')} {value / 1e6:.0f} MB")
        elif isinstance(value, float):
            words.append(f"{key} {value:.2f}")
        else:
            words.append(f"{key} {value}")
    print("  ".join(words), flush=True)


COMPARE = {
    "depth": compare_depths,
    "experts": compare_experts,
    "allocation": compare_allocations,
}


def main() -> int:
    parser = benchmark_parser(__doc__)
    comparisons = ["depth", "experts", "allocation", "plan"]
    parser.add_argument("comparison", nargs="?", choices=comparisons, default="depth")
    parser.add_argument("--sizes", type=int, nargs="+", help="numbers of blocks or of experts")
    arguments = parser.parse_args()
    kind = arguments.comparison
    if kind in ("depth", "experts") and arguments.sizes and len(arguments.sizes) != 2:
        parser.error(f"{kind} compares two sizes")
    with tempfile.TemporaryDirectory() as folder:
        if kind == "plan":
            found = compare_plans(Path(folder))
        else:
            found = COMPARE[kind](Path(folder), arguments.sizes or [*SIZES[kind]])
    write_json(arguments.json, found)
    if kind == "plan":
        return int(any(abs(row["ratio"] - 1) > TOLERANCE for row in found["rows"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
