#!/usr/bin/env python3
"""Count the share of a run that each of several processes does.

    python scripts/count_shares.py [--sizes 1 2 4] [--json FILE]

Quantizes tiny models with gloo on the CPU. Parts of rows are 16 instead of 1024, because the layers
are that much smaller. Prints a row of Markdown for each model, number of processes and kind of work
(forwards of blocks, products where rows are solved): the total, and the share of the process that
does most, which is 1/N at best.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

from common import benchmark_parser, write_json

from gptq_cli.config.schema import QuantizeConfig
from tests.families import save_model
from tests.quantization.ranks import ROWS, RUNS, team
from tests.quantization.test_ranks import DENSE, MIXTURE, SETTINGS
from tests.quantization.test_routed_experts import save_mixture
from tests.runs import config, digest


def count_work(
    label: str, model: Path, settings: QuantizeConfig, sizes: list[int]
) -> list[dict[str, Any]]:
    """Quantize `model` with each number of processes; return a row for each kind of work."""
    rows = []
    first_output = None
    for size in sizes:
        output = model.with_name(f"{model.name}-{size}")
        work, errors, codes = team(size, model, output, settings)
        if any(errors) or any(codes):
            sys.exit(f"{label}, {size} processes: {errors}, {codes}")
        if first_output is None:
            first_output = output
        same_bytes = digest(output) == digest(first_output)
        for kind in (RUNS, ROWS):
            counts = [done[kind] for done in work]
            total, most = sum(counts), max(counts)
            row = {"model": label, "processes": size, "work": kind, "counts": counts}
            row |= {"total": total, "most": most / total, "same_bytes": same_bytes}
            rows.append(row)
            print(f"| {label} | {size} | {kind} | {total} | {most / total:.3f} |", flush=True)
    return rows


def main() -> None:
    parser = benchmark_parser(__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 2, 4])
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        dense = save_model(Path(name) / "dense", num_hidden_layers=2)
        mixture = save_mixture(Path(name) / "mixture", "qwen3_moe", num_experts=8)
        for_dense, for_mixture = config(**SETTINGS, **DENSE), config(**SETTINGS, **MIXTURE)
        rows = count_work("dense, preset best", dense, for_dense, arguments.sizes)
        rows += count_work("mixture of 8 experts", mixture, for_mixture, arguments.sizes)
    write_json(arguments.json, rows)


if __name__ == "__main__":
    main()
