#!/usr/bin/env python3
"""Host memory against depth: quantizes two models of one width and 8 and 32 blocks, and compares their peaks.

What counts is private resident memory (RssAnon of the process, sampled every 10 ms): pages of mapped files belong to
the page cache. The larger model is about 440 MB of float32 weights, so holding it would show.

    python scripts/bench_memory.py [--blocks 8 32] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SHAPE = {
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 64,
}


def save_random_model(
    directory: Path, family: str, *, dtype: str = "float32", **shape: object
) -> None:
    """As `tests.families.save_model`, in a process of its own, so that it leaves nothing in this one."""
    code = f"""
import torch
from pathlib import Path
from tests.families import save_model
save_model(Path({str(directory)!r}), {family!r}, dtype=torch.{dtype}, **{shape!r})
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)


def private_bytes(pid: int) -> int:
    """RssAnon of a running process, 0 once it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")), 0)


def quantize_and_watch(model: Path, output: Path, words: list[str]) -> tuple[int, float]:
    """Peak private memory in bytes and wall time in seconds of one `gptq quantize` with the flags `words`."""
    command = [
        sys.executable,
        "-m",
        "gptq_cli",
        "quantize",
        str(model),
        "-o",
        str(output),
        "--quiet",
        *words,
    ]
    started, peak = time.perf_counter(), 0
    process = subprocess.Popen([*command, "--device", "cpu"], cwd=ROOT, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        peak = max(peak, private_bytes(process.pid))
        time.sleep(0.01)
    if process.returncode:
        raise SystemExit(f"gptq quantize failed with exit code {process.returncode}")
    return peak, time.perf_counter() - started


def flags(folder: Path, *, windows: int = 8, seqlen: int = 128, repeats: int = 400) -> list[str]:
    """Those of a short run at 4 bits, on a text in `folder` that is made here."""
    text = folder / "text.txt"
    text.write_text("some words to calibrate on, more or less different each time " * repeats)
    words = [
        "--bits",
        "4",
        "--dataset",
        str(text),
        "--nsamples",
        str(windows),
        "--seqlen",
        str(seqlen),
    ]
    return [*words, "--batch-size", "4"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--blocks", type=int, nargs=2, default=[8, 32])
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        words = flags(Path(folder))
        for n_blocks in arguments.blocks:
            model = Path(folder) / f"model-{n_blocks}"
            save_random_model(
                model, "llama", num_hidden_layers=n_blocks, max_shard_size="200MB", **SHAPE
            )
            weights = sum(file.stat().st_size for file in model.glob("*.safetensors"))
            peak, seconds = quantize_and_watch(model, Path(folder) / f"out-{n_blocks}", words)
            rows.append(
                {
                    "blocks": n_blocks,
                    "weights_bytes": weights,
                    "peak_bytes": peak,
                    "seconds": seconds,
                }
            )
            print(
                f"{n_blocks:3d} blocks  weights {weights / 1e6:6.0f} MB  peak {peak / 1e6:6.0f} MB  {seconds:5.1f} s"
            )
    ratio = rows[1]["peak_bytes"] / rows[0]["peak_bytes"]
    print(
        f"peak grows by a factor of {ratio:.3f} from {rows[0]['blocks']} to {rows[1]['blocks']} blocks"
    )
    if arguments.json:
        arguments.json.write_text(json.dumps({"rows": rows, "ratio": ratio}, indent=2) + "\n")


if __name__ == "__main__":
    main()
