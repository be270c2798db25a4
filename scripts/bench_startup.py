"""Start-up times of the commands that promise to be quick: medians of several runs, each in a fresh process."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RUNS = 9
DEMO = Path(__file__).resolve().parent / "demo" / "model"


COMPLETION = {
    "_GPTQ_COMPLETE": "complete_bash",
    "COMP_WORDS": "gptq quantize --gr",
    "COMP_CWORD": "2",
}
PROGRAM = "import sys; sys.argv[0] = 'gptq'; from gptq_cli.__main__ import main; main()"


def seconds(arguments: list[str], environment: dict[str, str]) -> tuple[float, float]:
    """Wall-clock and processor seconds of one run; the command must succeed."""
    started, before, env = time.perf_counter(), os.times(), {**os.environ, **environment}
    subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments], check=True, stdout=subprocess.DEVNULL, env=env
    )
    wall, after = time.perf_counter() - started, os.times()
    used = (
        after.children_user - before.children_user + after.children_system - before.children_system
    )
    return wall, used


def main() -> int:
    """Print a table; the exit code is 1 if a median is over its limit."""
    late = 0
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder) / "recipe.yaml"
        recipe.write_text("bits: 4\n", encoding="utf-8")
        limits: list[tuple[list[str], dict[str, str], float]] = [
            (["--help"], {}, 0.4),
            (["quantize", "--help"], {}, 0.6),
            (["validate-config", str(recipe)], {}, 0.6),
            (["plan", str(DEMO), "--bits", "4"], {}, 1.5),
            ([], COMPLETION, 0.6),
        ]
        for arguments, environment, limit in limits:
            seconds(arguments, environment)  # byte code and disk cache
            runs = [seconds(arguments, environment) for _ in range(RUNS)]
            times, used = (sorted(kind) for kind in zip(*runs, strict=True))
            median = statistics.median(times)
            late += median > limit
            name = " ".join(Path(word).name for word in arguments) or "quantize --gr<TAB>"
            print(
                f"gptq {name:<30} median {median:.3f} s  range {times[0]:.3f}-{times[-1]:.3f}  "
                f"processor {statistics.median(used):.3f} s  limit {limit} s"
            )
    return int(late > 0)


if __name__ == "__main__":
    sys.exit(main())
