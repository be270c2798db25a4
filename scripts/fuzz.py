#!/usr/bin/env python3
"""Damaged configurations, headers, indexes, settings, reports and run files, and strange names, many of each.

    python scripts/fuzz.py [--inputs 100000] [--seed 0] [--kind headers] [--output result.json]

Exit code 1 if one of them led to anything but acceptance or a refusal, with the numbers that make the inputs again.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"  # a damaged run file may name any model

import torch  # noqa: E402

from tests.fuzzing import SUBJECTS, fuzz  # noqa: E402
from tests.fuzzing_commands import CALLS  # noqa: E402

KINDS = SUBJECTS | CALLS


def main() -> int:
    """Fuzz each kind, print a line for each, write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--inputs",
        type=int,
        default=100_000,
        help="of each kind that is only read; of others fewer",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", choices=KINDS, action="append")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    result = {}
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
        print(
            f"{kind}: {tally.inputs} inputs in {seconds} s, {len(tally.failures)} failures, {outcomes}",
            flush=True,
        )
    if arguments.output:
        content = {
            "command": f"python scripts/fuzz.py --inputs {arguments.inputs} --seed {arguments.seed}",
            **result,
        }
        arguments.output.write_text(json.dumps(content, indent=1) + "\n")
    return int(any(kind["failures"] for kind in result.values()))


if __name__ == "__main__":
    sys.exit(main())
