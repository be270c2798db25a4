"""Start-up times of the commands that promise to be quick: medians of several runs, each in a fresh process."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RUNS = 9
DEMO = Path(__file__).resolve().parent / "demo" / "model"


def seconds(arguments: list[str]) -> float:
    """Wall-clock seconds of one run; the command must succeed."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "gptq_cli", *arguments], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def main() -> int:
    """Print a table; the exit code is 1 if a median is over its limit."""
    late = 0
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder) / "recipe.yaml"
        recipe.write_text("bits: 4\n", encoding="utf-8")
        limits = [
            (["--help"], 0.4),
            (["quantize", "--help"], 0.6),
            (["validate-config", str(recipe)], 0.6),
            (["plan", str(DEMO), "--bits", "4"], 1.5),
        ]
        for arguments, limit in limits:
            seconds(arguments)  # byte code and disk cache
            times = sorted(seconds(arguments) for _ in range(RUNS))
            median = statistics.median(times)
            late += median > limit
            name = " ".join(Path(word).name for word in arguments)
            print(f"gptq {name:<30} median {median:.3f} s  range {times[0]:.3f}-{times[-1]:.3f}  limit {limit} s")
    return int(late > 0)


if __name__ == "__main__":
    sys.exit(main())
