#!/usr/bin/env python3
"""Measure the start-up time of the commands that promise to be quick.

    python scripts/bench_startup.py [--runs 9]

Each run is a process of its own. Prints the median and the range of the wall time and the median
processor time of each command; the exit code is 1 if a median is over its limit.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from common import DEMO, argument_parser, median_of

PROGRAM = "import sys; sys.argv[0] = 'gptq'; from gptq_cli.__main__ import main; main()"
COMPLETION = {
    "_GPTQ_COMPLETE": "complete_bash",
    "COMP_WORDS": "gptq quantize --gr",
    "COMP_CWORD": "2",
}


@dataclass(frozen=True)
class Command:
    """A command with the limit of its median wall time in seconds."""

    name: str
    limit: float
    arguments: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)

    def seconds(self) -> dict[str, float]:
        """Return wall and processor seconds of one run, which must succeed."""
        before = os.times()
        started = time.perf_counter()
        words = [sys.executable, "-c", PROGRAM, *self.arguments]
        environment = {**os.environ, **self.environment}
        subprocess.run(words, check=True, stdout=subprocess.DEVNULL, env=environment)
        wall = time.perf_counter() - started
        after = os.times()
        user = after.children_user - before.children_user
        processor = user + after.children_system - before.children_system
        return {"wall": wall, "processor": processor}


def commands(recipe: Path) -> list[Command]:
    """Return the commands to measure; `recipe` is a valid configuration."""
    model = str(DEMO / "model")
    return [
        Command("--help", 0.4, ["--help"]),
        Command("quantize --help", 0.6, ["quantize", "--help"]),
        Command("validate-config recipe.yaml", 0.6, ["validate-config", str(recipe)]),
        Command("plan model --bits 4", 1.5, ["plan", model, "--bits", "4"]),
        Command("quantize --gr<TAB>", 0.6, environment=COMPLETION),
    ]


def main() -> int:
    parser = argument_parser(__doc__)
    parser.add_argument("--runs", type=int, default=9)
    arguments = parser.parse_args()
    code = 0
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder) / "recipe.yaml"
        recipe.write_text("bits: 4\n", encoding="utf-8")
        for command in commands(recipe):
            command.seconds()  # fills the caches of byte code and disk
            runs = [command.seconds() for _ in range(arguments.runs)]
            walls = sorted(run["wall"] for run in runs)
            median, processor = median_of(runs, "wall"), median_of(runs, "processor")
            if median > command.limit:
                code = 1
            print(
                f"gptq {command.name:<30} median {median:.3f} s  "
                f"range {walls[0]:.3f}-{walls[-1]:.3f}  "
                f"processor {processor:.3f} s  limit {command.limit} s"
            )
    return code


if __name__ == "__main__":
    sys.exit(main())
