#!/usr/bin/env python3
"""Feed many damaged files and strange names to the code that reads them.

    python scripts/fuzz.py [--inputs 100000] [--seed 0] [--kind headers] [--output result.json]

The kinds are configurations, headers, indexes, settings, reports, run files and names. Prints a
line for each kind. The exit code is 1 if an input led to anything but acceptance or a refusal; the
result then holds the numbers from which the inputs can be made again.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path

from common import argument_parser, write_json

os.environ["HF_HUB_OFFLINE"] = "1"  # a damaged run file may name any model

import torch

from tests.fuzzing import SUBJECTS, fuzz
from tests.fuzzing_commands import CALLS

KINDS = SUBJECTS | CALLS


def main() -> int:
    """Fuzz each kind, print a line for each, write the result."""
    parser = argument_parser(__doc__)
    about = "inputs of each kind that is only read; other kinds get fewer"
    parser.add_argument("--inputs", type=int, default=100_000, help=about)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", choices=KINDS, action="append")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    command = f"python scripts/fuzz.py --inputs {arguments.inputs} --seed {arguments.seed}"
    result: dict[str, object] = {"command": command}
    code = 0
    for kind in arguments.kind or KINDS:
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            tally = fuzz(KINDS[kind], arguments.inputs, arguments.seed, Path(folder))
        seconds = round(time.perf_counter() - started, 1)
        outcomes = dict(tally.outcomes.most_common())
        result[kind] = {
            "inputs": tally.inputs,
            "seconds": seconds,
            "outcomes": outcomes,
            "failures": tally.failures,
        }
        counts = f"{len(tally.failures)} failures, {outcomes}"
        print(f"{kind}: {tally.inputs} inputs in {seconds} s, {counts}", flush=True)
        if tally.failures:
            code = 1
    write_json(arguments.output, result)
    return code


if __name__ == "__main__":
    sys.exit(main())
