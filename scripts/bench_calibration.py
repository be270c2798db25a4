#!/usr/bin/env python3
"""Measure what the calibration text is worth: quantize with each text, evaluate on each other text.

    python scripts/bench_calibration.py MODEL --calibration FILE ... --evaluation FILE ...
        [--bits 4 3] [--group-size 64] [--json FILE]

Prints one JSON object for each run, then a table in Markdown. KL is the mean over all windows of an
evaluation text of KL(original || quantized) in nats. `scripts/chats` has chats for both.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from common import benchmark_parser, name_of, write_json

from gptq_cli.config.schema import QuantizeConfig
from gptq_cli.evaluation.perplexity import evaluate_perplexity
from gptq_cli.evaluation.request import EvalRequest
from gptq_cli.quantization.run import quantize_checkpoint


def measure(arguments: argparse.Namespace, bits: int, calibration: Path) -> list[dict[str, Any]]:
    """Quantize once; return a row for each evaluation text."""
    config = QuantizeConfig(
        bits=bits,
        group_size=arguments.group_size,
        preset=arguments.preset,
        dataset=str(calibration),
        nsamples=arguments.nsamples,
        seqlen=arguments.seqlen,
        device="cpu",
        dtype="float32",
    )
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "quantized"
        done = quantize_checkpoint(str(arguments.model), output, config)
        for evaluation in arguments.evaluation:
            request = EvalRequest(
                dataset=str(evaluation),
                seqlen=arguments.seqlen,
                batch_size=8,
                max_windows=arguments.windows,
                device="cpu",
                dtype="float32",
                baseline=str(arguments.model),
            )
            found = evaluate_perplexity(str(output), request)
            row = {
                "bits": bits,
                "calibration": name_of(calibration),
                "evaluation": name_of(evaluation),
                "kl": found.kl,
                "top1": found.top1_agreement,
                "perplexity": found.perplexity,
                "original_perplexity": found.baseline_perplexity,
                "tokens": found.tokens,
                "seconds": done.seconds,
            }
            print(json.dumps(row), flush=True)
            rows.append(row)
    return rows


def print_table(rows: list[dict[str, Any]]) -> None:
    """Print the rows as Markdown."""
    print("\n| bits | calibration | evaluation | KL x 1000 | top-1 | perplexity | original |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        where = f"{row['bits']} | {row['calibration']} | {row['evaluation']}"
        figures = f"{1000 * row['kl']:.2f} | {100 * row['top1']:.1f} | {row['perplexity']:.2f}"
        print(f"| {where} | {figures} | {row['original_perplexity']:.2f} |")


def main() -> None:
    """Carry out all runs and print a table."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", type=Path, nargs="+", required=True)
    parser.add_argument("--evaluation", type=Path, nargs="+", required=True)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3])
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--preset", default="balanced")
    parser.add_argument("--nsamples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--windows", type=int, help="of each evaluation text; default: all")
    arguments = parser.parse_args()
    rows = []
    for bits in arguments.bits:
        for calibration in arguments.calibration:
            rows += measure(arguments, bits, calibration)
    print_table(rows)
    settings = ("group_size", "preset", "nsamples", "seqlen", "windows")
    run = {name: getattr(arguments, name) for name in settings}
    write_json(arguments.json, {"run": {"model": arguments.model.name, **run}, "rows": rows})


if __name__ == "__main__":
    main()
